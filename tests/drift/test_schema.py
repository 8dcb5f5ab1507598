"""What a file of a drift report must hold: the first thing that is wrong is named in half a sentence."""

import copy

import pytest
import torch

from agl_trl.artifacts.files import ArtifactError, load_tensors
from agl_trl.drift.schema import check_drift
from tests.helpers.reports import behaviour_by_hand, report_by_hand


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[dict, dict]:
    """Tensors and metadata as they are in the file."""
    return load_tensors(report_by_hand(behaviour_by_hand()).save_pretrained(tmp_path_factory.mktemp("good")))


def sentence_for(tensors: dict, metadata: dict) -> str:
    with pytest.raises(ArtifactError) as failed:
        check_drift(tensors, metadata)
    return str(failed.value)


def test_what_was_written_passes(good):
    check_drift(*good)


@pytest.mark.parametrize(
    ("where", "value", "sentence"),
    [
        (("layers",), [], "it names 0 layers, of which 0 differ"),
        (("layers",), ["a", "b", "c", "a"], "it names 4 layers, of which 3 differ"),
        (("layers",), ["a", "b", "c", "<d>"], "'<d>' is no name of a layer"),
        (("layers",), ["a", "b", "c"], "'relative_drift' is torch.float32 of shape [4], not floats of (3,)"),
        (("global_step",), -1, "'global_step' is -1, below 0"),
        (("global_step",), "2", "'global_step' is '2', not a valid integer"),
        (("budget_multiplier",), -0.5, "'budget_multiplier' is -0.5, below 0"),
        (("adapter_sha256",), "AB" * 32, f"'adapter_sha256' is '{'AB' * 32}'"[:70]),
        (("fisher", "shrinkage"), None, "'fisher.shrinkage' is None, not a valid number"),
        (("summary",), {}, "'summary.mean_relative_drift' is missing"),
        (("behaviour",), None, "tensor 'direction_cosine' does not belong there"),
        (("behaviour", "categories"), [], "'behaviour' is of no prompt"),
        (("behaviour", "categories"), ["a"], "'unsafe' is torch.bool of shape [7]"),
        (("behaviour", "judge"), {"name": "x"}, "'behaviour.judge.version' is missing"),
    ],
)
def test_metadata_that_is_wrong_is_named(where, value, sentence, good):
    tensors, metadata = good[0], copy.deepcopy(good[1])
    place = metadata
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    assert sentence_for(tensors, metadata).startswith(sentence)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("overlap", None, "tensor 'overlap' is missing"),
        ("overlap", lambda t: t - 1, "'overlap' is below -1e-06"),
        ("relative_drift", lambda t: t * torch.inf, "'relative_drift' is not finite"),
        ("task_energy", lambda t: t.int(), "'task_energy' is torch.int32 of shape [4], not floats of (4,)"),
        ("refused_base", lambda t: t.float(), "'refused_base' is torch.float32 of shape [7]"),
        ("nll_tuned", lambda t: t[:-1], "the figures of the answers have shapes [(6,), (7,)] or are no floats"),
        ("hidden_drift", lambda t: t[:-1], "the figures of the hidden states have shapes [(2,), (3,)]"),
        ("history.loss", lambda t: t[:-1], "the figures of the history have shapes [(1,), (2,)]"),
        ("history.a b", lambda t: torch.ones(2), "'a b' is no name of a layer"),
        ("more", lambda t: torch.ones(1), "tensor 'more' does not belong there"),
    ],
)
def test_tensors_that_are_wrong_are_named(name, change, sentence, good):
    tensors = dict(good[0])
    changed = tensors.pop(name, None)
    if change is not None:
        tensors[name] = change(changed)
    assert sentence_for(tensors, good[1]).startswith(sentence)


def test_what_was_not_measured_may_be_nan_and_rounding_may_be_negative(good):
    tensors, metadata = good
    check_drift(tensors | {"task_energy": torch.full((4,), -1e-7)}, metadata)
    check_drift(tensors | {"margin_base": torch.full((7,), torch.nan)}, metadata)


def test_report_without_answers_or_history_passes(good):
    tensors, metadata = good
    weights = {name: tensors[name] for name in ("relative_drift", "alignment_energy", "task_energy", "overlap")}
    check_drift(weights, {name: value for name, value in metadata.items() if name != "behaviour"})
