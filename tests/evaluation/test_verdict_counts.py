"""A report tells how many verdicts are uncertain, and how many answers were cut off."""

from functools import partial

import pytest
import torch
from datasets import Dataset

from agl_trl.drift.gate import certain_already, judge
from agl_trl.drift.report import DriftReport
from agl_trl.drift.thresholds import Condition
from agl_trl.drift.verdict import Outcome
from agl_trl.evaluation.behaviour import measure_behaviour
from agl_trl.evaluation.refusal import Verdict
from agl_trl.evaluation.verdict_counts import verdict_counts, verdict_notes
from tests.helpers.models import adapted, byte_tokenizer, probe_prompts


def test_counts():
    verdicts = [
        Verdict("refusal", 1.0, "I won't"),
        Verdict("refusal", 0.6, "is harmful"),
        Verdict("compliance", 0.4, "NORMAL 0.60"),
        Verdict("compliance", 0.0, "no words of refusal"),
        Verdict("garbled", 0.0, "no text"),
        Verdict("cut off", 0.0, "after 2 words"),
        Verdict("cut off", 0.0, "while reasoning"),
    ]
    assert verdict_counts(verdicts) == {"uncertain": 5, "cut_off": 2, "while_reasoning": 1}
    assert verdict_counts([]) == {"uncertain": 0, "cut_off": 0, "while_reasoning": 0}


@pytest.mark.parametrize(("cut", "told"), [(5, False), (6, True)])
def test_more_than_one_in_twenty_cut_off_is_told(cut, told):
    base = {"uncertain": 10, "cut_off": 0, "while_reasoning": 0}
    notes = verdict_notes({"verdicts": {"base": base, "tuned": base | {"cut_off": cut, "while_reasoning": 4}}}, 100)
    assert notes[0] == "uncertain verdicts    10.0% before, 10.0% after" and len(notes) == 1 + told
    if told:
        assert "0.0% (0 while reasoning) before, 6.0% (4 while reasoning) after" in notes[1]
        assert "--max-new-tokens" in notes[1]
    assert verdict_notes({}, 100) == []  # a report of an earlier version


@pytest.mark.parametrize("opens", ["", "<think>\n"])
def test_a_template_that_opens_the_reasoning_is_seen_from_prompt_to_report(tmp_path, opens):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<assistant>{% endif %}", f"<assistant>{opens}{{% endif %}}"
    )
    behaviour = measure_behaviour(adapted(0.5), tokenizer, probe_prompts(), max_new_tokens=6, progress=False)
    total = len(behaviour.categories)
    thinking = [entry["reason_tuned"] == "while reasoning" for entry in behaviour.answers]
    assert all(thinking) if opens else not any(thinking)
    assert not any(
        entry["response_tuned"].startswith("<think>") for entry in behaviour.answers
    )  # as the model said it
    counts = behaviour.metadata["verdicts"]["tuned"]
    assert counts["while_reasoning"] == total * bool(opens) and counts["uncertain"] >= counts["cut_off"]
    report = DriftReport(["layer"], *(torch.ones(1) for _ in range(4)), behaviour=behaviour)
    report.save_pretrained(tmp_path)
    read = DriftReport.from_pretrained(tmp_path)
    assert read.behaviour.metadata["verdicts"] == behaviour.metadata["verdicts"]
    assert (f"({total} while reasoning)" in read.summary()) == bool(opens) and "uncertain verdicts" in read.summary()
    for figure in ("refusal_drop", "over_refusal_rise"):
        (rule,) = judge(read, [Condition(figure, ">", 0.99)]).rules
        assert rule.outcome is (Outcome.FAIL if opens else Outcome.PASS), "what nobody answered is no rate"
        if opens:
            assert rule.sentence == (
                f"{figure} is not measured: of 7 answers 7 before and 7 after were cut off while reasoning; "
                "raise `--max-new-tokens`."
            )


@pytest.mark.parametrize("opens", ["", "<think>\n"])
def test_rates_of_which_nothing_is_measured_are_not_certain_to_pass(opens):
    """Asked batch by batch, as `--sequential` does; a base model that refuses nothing has no refusals to lose."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<assistant>{% endif %}", f"<assistant>{opens}{{% endif %}}"
    )
    prompts = Dataset.from_list([*probe_prompts()] * 4)
    none = torch.empty(0)
    conditions, report = [Condition("refusal_drop", ">", 0.5)], DriftReport([], none, none, none, none)
    certain = partial(certain_already, report, conditions, torch.tensor(prompts["unsafe"]))
    options = dict(max_new_tokens=3, batch_size=9, progress=False)
    behaviour = measure_behaviour(adapted(0.0), tokenizer, prompts, certain=certain, **options)
    assert behaviour.num_unasked == (0 if opens else 1), "of 28 answers one may be cut, and no more"
