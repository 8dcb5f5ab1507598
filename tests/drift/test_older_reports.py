"""Reports from before are read, or refused with a sentence; no value of theirs breaks a card."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from agl_trl import DriftReport
from agl_trl.artifacts.files import ArtifactError, canonical_json
from agl_trl.drift.schema import PER_PROMPT
from agl_trl.hub.card_text import render_adapter, render_evidence


LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
REQUIRED = {
    "schema_version": 1,
    "kind": "drift",
    "layers": LAYERS,
    "global_step": 40,
    "budget_multiplier": None,
    "adapter_sha256": "ab" * 32,
    "summary": {"mean_relative_drift": 0.5},
}
ANSWERS = {"categories": ["a", "b"]}


def written(folder: Path, metadata: dict, *, answers: bool = False, without: str | None = None) -> Path:
    """A file as an early version, or another program, wrote it: no checksum, and whatever metadata."""
    names = ("relative_drift", "alignment_energy", "task_energy", "overlap")
    tensors = {name: torch.full((2,), 0.5) for name in names}
    if answers:
        tensors |= {name: torch.rand(2) for name in PER_PROMPT}
        tensors |= {name: torch.tensor([True, False]) for name in ("unsafe", "refused_base", "refused_tuned")}
    tensors.pop(without or "", None)
    (folder / "agl").mkdir(exist_ok=True)
    save_file(tensors, folder / "agl" / "drift.safetensors", metadata={"agl": canonical_json(metadata)})
    return folder


def card_of(folder: Path) -> str:
    report = DriftReport.from_pretrained(folder)
    assert "relative drift" in report.summary()
    return render_adapter("n", report, None, "user/n") + render_evidence(report, "user/n", False)


@pytest.mark.parametrize(
    "older",
    [
        {},
        {"coefficients": {}, "fisher": None, "base_model": None},
        {"coefficients": None},
        {"coefficients": {"variant": "paper"}},
        {"coefficients": {"variant": "kfac", "alignment": 1, "drift_budget": None, "collision": 0.5}},
        {"coefficients": {"alignment": 0.2, "unknown": "a", "another": None}, "unknown": {"a": [1]}},
        {"fisher": {"damping": 0.3, "num_tokens": 7, "seed": 0}},
        {"continued": True, "projected": {"budget": 1e-3, "drift_before": 0.5}},
    ],
    ids=lambda older: "-".join(older) or "bare",
)
@pytest.mark.parametrize(
    "behaviour",
    [None, ANSWERS, ANSWERS | {"judge": None, "prompts": None, "decoding": "greedy"}, ANSWERS | {"prompts": {}}],
    ids=["weights", "answers", "nulls", "no-name"],
)
def test_reports_that_lack_what_came_later_are_read(older, behaviour, tmp_path):
    metadata = REQUIRED | older | ({} if behaviour is None else {"behaviour": behaviour})
    card = card_of(written(tmp_path, metadata, answers=behaviour is not None))
    assert "5.000e-01" in card and "None" not in card


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"coefficients": {"alignment": "a"}}, "'coefficients.alignment' is 'a', not a valid number"),
        ({"coefficients": {"alignment": None}}, "'coefficients.alignment' is None, not a valid number"),
        (
            {"coefficients": {"task_metric": "magic"}},
            "'coefficients.task_metric' is 'magic', not 'rest', 'identity' or",
        ),
        ({"coefficients": {"drift_budget": [1]}}, r"'coefficients.drift_budget' is \[1\], not a valid number"),
        ({"coefficients": {"anchor_every": 0.5}}, "'coefficients.anchor_every' is 0.5, not a valid integer"),
        ({"coefficients": {"unknown": {"a": 1}}}, "'coefficients.unknown"),
        ({"coefficients": [1]}, r"'coefficients' is \[1\], not a valid dictionary"),
        ({"projected": {"budget": 1e-3}}, "'projected.drift_before' is missing"),
        ({"fisher": {"seed": 0}}, "'fisher.shrinkage' is missing"),
        ({"behaviour": ANSWERS | {"prompts": "a set"}}, "'behaviour.prompts' is 'a set', not a valid dictionary"),
        ({"behaviour": ANSWERS | {"prompts": {"name": 1}}}, "'behaviour.prompts.name' is 1, not a valid string"),
        ({"behaviour": ANSWERS | {"judge": {"name": "j"}}}, "'behaviour.judge.version' is missing"),
    ],
    ids=str,
)
def test_what_no_version_wrote_is_refused_with_a_sentence(wrong, sentence, tmp_path):
    with pytest.raises(ArtifactError, match=sentence):
        DriftReport.from_pretrained(written(tmp_path, REQUIRED | wrong, answers="behaviour" in wrong))


@pytest.mark.parametrize("name", [*REQUIRED, "overlap", "kl_first_tokens", "hidden_drift"])
def test_what_is_missing_is_named(name, tmp_path):
    """Of the first version: it knew no overlap, no probes and no budget."""
    metadata = {key: value for key, value in (REQUIRED | {"behaviour": ANSWERS}).items() if key != name}
    sentence = {"schema_version": "no schema version", "kind": "no drift report"}.get(name, f"'{name}' is missing")
    with pytest.raises(ArtifactError, match=sentence):
        DriftReport.from_pretrained(written(tmp_path, metadata, answers=True, without=name))
