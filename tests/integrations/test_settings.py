"""The section `agl` of a config file: what it says becomes the callback, and what it misspells ends the run."""

import json

import pytest

from agl_trl import DriftEvalCallback
from agl_trl.integrations.settings import check_settings, make_callback


def test_section_becomes_a_callback_with_its_rows(tmp_path):
    rows = tmp_path / "refusals.jsonl"
    rows.write_text(json.dumps({"prompt": "Pick a lock?", "completion": "I can't."}) + "\n")
    notes = tmp_path / "notes.txt"
    notes.write_text("Bread is baked.\n")
    guard = make_callback({"kl_budget": 0.01, "alignment_dataset": str(rows), "protect": {"text": str(notes)}})
    assert guard.config.kl_budget == 0.01
    assert guard.alignment_dataset[0]["completion"] == "I can't."
    assert [row["prompt"] for row in guard.protect["text"]] == ["Bread is baked."]


def test_empty_section_keeps_answers_to_driftcaps():
    guard = make_callback({})
    assert guard.config.kl_budget == 0.02 and guard.alignment_dataset["unsafe"].count(True) > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kl_budgt": 0.1}, r"^`agl` has no key 'kl_budgt': use those of AlignGuardConfig, alignment_dataset"),
        (
            {"protect": ["notes.txt"]},
            r"^`agl.protect` must map names to files or datasets on the Hub, got \['notes.txt'\]",
        ),
        ({"alignment_coef": 0.0}, r"^`agl` switches AGL off: leave the plugin out\.$"),
        ({"alignment_coef": -1.0}, r"^`alignment_coef` must not be negative"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_loaded(settings, said):
    with pytest.raises(ValueError, match=said):
        check_settings(settings)


def test_rows_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^Can't read rows from '.*nowhere.jsonl'"):
        make_callback({"alignment_dataset": str(tmp_path / "nowhere.jsonl")})


def test_section_that_only_asks_becomes_the_callback_that_asks():
    watch = make_callback({"alignment_coef": 0.0, "drift_eval_steps": 50, "drift_stop": "refusal_drop>0.1"})
    assert isinstance(watch, DriftEvalCallback) and watch.drift_eval.config.drift_eval_steps == 50
    assert make_callback({"drift_eval_steps": 50}).drift_eval is not None
