"""The pictures: every figure in its place, the same bytes for the same report, and no global state."""

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agl_trl.drift import plots
from agl_trl.drift.plots import block_of, grid_names, module_of, plot_drift
from tests.helpers.reports import LAYERS, behaviour_by_hand, report_by_hand


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Figures as they are written, to be looked into."""
    figures: list[Figure] = []
    png = plots.png
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or png(figure))
    return figures


def layers_axes(figure: Figure) -> Axes:
    return next(axes for axes in figure.axes if axes.get_xlabel() == "block")


def test_layers_are_told_by_module_and_block():
    assert grid_names(LAYERS) == (["self_attn.q_proj", "mlp.down_proj"], [0, 1])
    assert (module_of("transformer.h.11.attn.c_attn"), block_of("transformer.h.11.attn.c_attn")) == ("attn.c_attn", 11)
    assert (module_of("score"), block_of("score")) == ("score", 0), "a layer in no block"


def test_every_layer_is_a_cell_of_its_drift(drawn, tmp_path):
    plot_drift(report_by_hand(), tmp_path / "drift.png")
    axes = layers_axes(drawn[0])
    np.testing.assert_allclose(axes.images[0].get_array(), [[1e-3, 3e-3], [2e-3, 4e-3]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["self_attn.q_proj", "mlp.down_proj"]
    assert "mean 2.50e-03" in axes.get_title()


def test_refusals_are_drawn_by_category_with_their_intervals(drawn, tmp_path):
    behaviour = behaviour_by_hand()
    plot_drift(report_by_hand(behaviour), tmp_path / "drift.png", name="ours", others={"plain": behaviour})
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["fraud", "weapons", "safe prompts"]
    before, plain, ours = axes.containers
    assert [container.get_label() for container in axes.containers] == ["before", "plain", "ours"]
    for container, rates in ((before, [1, 1, 0]), (plain, [0, 1, 1 / 3]), (ours, [0, 1, 1 / 3])):
        assert container.lines[0].get_xdata().tolist() == pytest.approx(rates)
    (bars,) = ours.lines[2]
    low, high = behaviour.refusal(True, False).interval
    assert bars.get_segments()[2][:, 0].tolist() == pytest.approx([low, high])


def test_picture_is_reproducible_and_leaves_no_state(tmp_path):
    before = dict(matplotlib.rcParams)
    for name in ("one", "other"):
        plot_drift(report_by_hand(behaviour_by_hand()), tmp_path / name / "drift.png")
    content = (tmp_path / "one" / "drift.png").read_bytes()
    assert content[:4] == b"\x89PNG" and content == (tmp_path / "other" / "drift.png").read_bytes()
    assert b"matplotlib" not in content.lower() and dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("drift", [[0.0] * 4, [0.0, 0.0, 0.0, 1e-30], [1e-3] * 4])
def test_drifts_without_a_range_are_drawn(drift, tmp_path):
    report = report_by_hand()
    report.relative_drift = torch.tensor(drift)
    plot_drift(report, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 5000


def test_picture_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Cannot write"):
        plot_drift(report_by_hand(), tmp_path / "file" / "drift.png")
