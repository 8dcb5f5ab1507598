"""The sums of an interrupted pass: kept bit for bit, and used for the same pass alone."""

import pytest
import torch

from agl_trl.fisher import partial_sums
from agl_trl.fisher.partial_sums import PartialSums, weights_fingerprint
from agl_trl.objective.covariance import CovarianceSketch
from tests.helpers.models import tiny_model


KEY = {"seed": 0, "layers": ["a", "b"]}
INPUT_OF = {"a": "a", "b": "a"}


@pytest.fixture
def sketches() -> tuple[dict[str, CovarianceSketch], dict[str, CovarianceSketch]]:
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    sides = {"a": CovarianceSketch(6, None)}, {"a": CovarianceSketch(6, None), "b": CovarianceSketch(6, None)}
    for number, sketch in enumerate(sketch for side in sides for sketch in side.values()):
        sketch.update((number + 1) * rows)
    return sides


@pytest.fixture
def saved(sketches, tmp_path, monkeypatch) -> PartialSums:
    monkeypatch.setattr(partial_sums, "SAVE_EVERY", 0.0)
    sums = PartialSums(tmp_path, KEY)
    sums.save(3, INPUT_OF, *sketches)
    return sums


def test_sums_survive_the_round_trip(saved, sketches, tmp_path):
    done, input_of, sums = PartialSums(tmp_path, KEY).load()
    assert (done, input_of) == (3, INPUT_OF) and {side: [*of] for side, of in sums.items()} == {
        "inputs": ["a"],
        "outputs": ["a", "b"],
    }
    for side, layers in zip(("inputs", "outputs"), sketches, strict=True):
        for name, sketch in layers.items():
            for part in ("sums", "trace", "count"):
                assert torch.equal(sums[side][name][part], getattr(sketch, part)), (side, name, part)
    saved.remove()
    assert not saved.path.exists() and saved.load() == (0, {}, {})
    saved.remove()  # twice is no failure


def test_sums_of_another_pass_are_not_used(saved, tmp_path, caplog):
    assert PartialSums(tmp_path, KEY | {"seed": 1}).load() == (0, {}, {})
    assert caplog.records[-1].message.startswith("The pass starts anew: ") and "other settings" in caplog.text
    saved.path.write_bytes(saved.path.read_bytes()[:-1])
    assert saved.load() == (0, {}, {})
    assert caplog.records[-1].message.startswith("The pass starts anew: ") and str(saved.path) in caplog.text


def test_sums_are_written_now_and_then(sketches, tmp_path):
    sums = PartialSums(tmp_path, KEY)
    sums.save(1, INPUT_OF, *sketches)
    assert not sums.path.exists(), "a pass of seconds writes nothing"


def test_fingerprint_tells_weights_apart_that_share_a_config():
    same = weights_fingerprint(tiny_model())
    assert weights_fingerprint(tiny_model()) == same
    other = tiny_model()
    other.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1e-3
    assert len({same, *map(weights_fingerprint, (other, tiny_model(seed=1), tiny_model(dtype=torch.bfloat16)))}) == 4
