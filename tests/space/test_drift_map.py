"""What is drawn of drift reports, and what is said where there is none to draw."""

import math
import shutil
from dataclasses import replace

import pytest
import torch

from agl_trl.artifacts.files import ADAPTER_FILE
from agl_trl.drift.report import DriftReport
from agl_trl.space.drift_map import MEASURES, AdapterDrift, Curve, Energy, Scale, drift_map, summary
from agl_trl.space.models import ADAPTERS, EMBEDDED, Models


@pytest.fixture
def report() -> DriftReport:
    return DriftReport.from_pretrained(ADAPTERS / "agl")


def test_all_adapters_are_in_one_scale(models):
    for label, name in MEASURES.items():
        drawn = drift_map(models.own, label)
        reports = [panel.drift.report for panel in drawn.panels]
        values = torch.cat([getattr(report, name) for report in reports])
        assert drawn.scale == (values[values > 0].min().item(), values.max().item())
        plain, agl = (panel.drift for panel in drawn.panels)
        assert len(agl.values) == len(agl.modules) * len(agl.blocks) == 28
        assert (
            agl.values["self_attn.v_proj", 2]
            == getattr(reports[1], name)[reports[1].layers.index("model.layers.2.self_attn.v_proj")]
        )
        assert plain.values.keys() == agl.values.keys()


def test_scale_is_logarithmic():
    scale = Scale(1e-4, 1e-2)
    assert [round(scale.heat(value), 6) for value in (0.0, 1e-4, 1e-3, 1e-2)] == [0.0, 0.0, 0.5, 1.0]
    assert Scale(0.1, 0.1).heat(0.1) == 1.0


def test_nothing_moved(report):
    still = AdapterDrift(
        replace(
            report,
            **{name: torch.zeros(28) for name in MEASURES.values()},
            history={},
            behaviour=None,
        ),
        {},
    )
    assert still.alignment_share == 0.0 and still.curves == [] and still.refusals == []
    assert {(energy.total, energy.share) for energy in still.energies} == {(0.0, 0.0)}


def test_energies_add_up(report):
    drawn = AdapterDrift(report, {})
    total = sum(energy.total for energy in drawn.energies) / len(drawn.blocks)
    assert total == pytest.approx(report.mean_relative_drift, rel=1e-4)
    assert Energy(0, 3.0, 1.0).share == 0.75
    assert drawn.alignment_share == pytest.approx(
        sum(energy.alignment for energy in drawn.energies) / sum(energy.total for energy in drawn.energies), rel=1e-4
    )
    unsafe, harmless = drawn.refusals
    assert unsafe.unsafe and unsafe.before > 0.95 and unsafe.after > 0.95 and harmless.after < 0.1


def test_curves_leave_out_what_is_no_number(report):
    history = {
        "step": torch.tensor([10.0, 20.0, 30.0]),
        "loss": torch.tensor([4.0, math.nan, 2.0]),
        "relative_drift": torch.zeros(3),
    }
    assert AdapterDrift(replace(report, history=history), {}).curves == [Curve("loss", [(10.0, 4.0), (30.0, 2.0)])]
    assert Curve("loss", [(10.0, 4.0), (20.0, 2.0), (30.0, 3.0)]).scaled() == [(0.0, 1.0), (0.5, 0.0), (1.0, 0.5)]
    assert Curve("loss", [(1.0, 3.0), (2.0, 3.0)]).scaled() == [(0.0, 0.0), (1.0, 0.0)]


def test_says_what_is_wrong_with_a_report(tmp_path):
    for name in ("none", "other"):
        shutil.copytree(ADAPTERS / "agl", tmp_path / name)
    shutil.rmtree(tmp_path / "none" / "agl")
    shutil.copy(ADAPTERS / "plain" / ADAPTER_FILE, tmp_path / "other")
    for name, said in (("none", "has no drift report"), ("other", "report is of another adapter")):
        model = Models(EMBEDDED, str(tmp_path / name)).own
        drawn = drift_map(model, "Relative drift")
        [panel] = drawn.panels
        assert said in panel.notice and panel.drift is None and drawn.scale is None
        assert summary(model) == [{"model": "Fine-tuned", "notice": panel.notice}]
