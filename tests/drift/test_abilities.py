"""Abilities in a report: saved and read, told in summary, page and card, and judged by rules of their own."""

from dataclasses import replace

import pytest
import torch

from agl_trl import DriftReport
from agl_trl.drift.gate import certain_already, hopeless, judge
from agl_trl.drift.html import facts, not_measured, what_changed, write_page
from agl_trl.drift.thresholds import Condition, figures, on_sets
from agl_trl.drift.verdict import Outcome
from agl_trl.evaluation.abilities import Ability
from agl_trl.evaluation.changes import PairedRates
from agl_trl.hub.card_metadata import eval_results
from agl_trl.hub.card_text import render_evidence
from tests.helpers.reports import abilities_by_hand, behaviour_by_hand, report_by_hand


SETS = {"arc_challenge": False, "my-facts": False, "notes": True}


def report(**changes) -> DriftReport:
    return replace(report_by_hand(behaviour_by_hand()), **{"abilities": abilities_by_hand(), **changes})


def rules(*texts: str) -> list[Condition]:
    return [Condition.parse(text) for text in texts]


def test_report_is_read_as_it_was_saved(tmp_path):
    report().save_pretrained(tmp_path)
    read = DriftReport.from_pretrained(tmp_path)
    for one, other in zip(report().abilities, read.abilities, strict=True):
        assert (one.name, one.kind, one.metadata) == (other.name, other.kind, other.metadata)
        assert torch.equal(one.base, other.base) and torch.equal(one.tuned, other.tuned)
        assert (one.raw_tuned is None) == (other.raw_tuned is None)
    assert read.summary() == report().summary() and "abilities" not in read.metadata


def test_report_without_abilities_is_the_file_that_it_was(tmp_path):
    """One that an earlier version wrote has no word of them."""
    path = report_by_hand(behaviour_by_hand()).save_pretrained(tmp_path)
    assert b"abilit" not in path.read_bytes() and DriftReport.from_pretrained(tmp_path).abilities == []


def test_summary_says_both_sides():
    lines = {line.split()[0]: line for line in report().summary().splitlines()}
    assert lines["arc_challenge"] == (
        "arc_challenge         80.0% right before, 69.0% after (95 % interval 59.4% to 77.2%, 100 rows, 12 lost, 1 won, paired p 0.0034); "
        "by likelihood without its length 20.0% and 31.0%"
    )
    assert "80.0% right before, 80.0% after" in lines["my-facts"] and "paired p 1)" in lines["my-facts"]
    assert lines["notes"].startswith(
        "notes                 NLL 2.000 before, 2.100 after: +0.100 nats per token (90 % interval +0.0"
    )


def test_figures_are_named_by_set():
    found = figures(report())
    assert found["ability_drop:arc_challenge"] == pytest.approx(0.11) and found["ability_drop:my-facts"] == 0
    assert found["nll_rise:notes"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("rule", "outcome"),
    [
        ("ability_drop:arc_challenge>0.08", Outcome.INSUFFICIENT),
        ("ability_drop:arc_challenge > 0.02", Outcome.FAIL),
        ("ability_drop:arc_challenge>0.3", Outcome.PASS),
        ("ability_drop:my-facts>0.05", Outcome.PASS),
        ("nll_rise:notes>0.05", Outcome.FAIL),
        ("nll_rise:notes>0.1", Outcome.INSUFFICIENT),
        ("nll_rise>0.2", Outcome.PASS),
    ],
)
def test_a_set_is_judged_by_its_change(rule, outcome):
    (found,) = judge(report(), rules(rule)).rules
    assert found.outcome is outcome
    change = PairedRates(12, 1, 100)
    if rule.startswith("ability_drop:arc"):
        assert (
            found.value == change.value and found.interval == change.interval() and "(90 % interval" in found.sentence
        )
        assert "100 rows)" in found.sentence and "prompts" not in found.sentence
    if rule == "nll_rise:notes>0.1":
        assert "40 pieces of text)" in found.sentence and "These pieces of text could have shown" in found.sentence


def test_rule_without_a_name_is_one_on_every_set_and_all_are_corrected():
    verdict = judge(report(), rules("ability_drop>0.02", "nll_rise>0.2", "ability_drop:my-facts>0.02"))
    assert [str(rule.condition) for rule in verdict.rules] == [
        "ability_drop:arc_challenge>0.02", "ability_drop:my-facts>0.02", "nll_rise:notes>0.2",
    ]  # fmt: skip
    alone = judge(report(), rules("ability_drop:arc_challenge>0.02")).rules[0]
    assert verdict.rules[0].p_value == pytest.approx(3 * alone.p_value) and verdict.outcome is Outcome.FAIL


@pytest.mark.parametrize(
    ("rule", "sets", "sentence"),
    [
        ("ability_drop>0.1", {}, "'ability_drop>0.1' needs a set with right answers: name one as `--ability`."),
        ("nll_rise>0.1", {"a": False}, "needs a set of texts: name one as `--ability`"),
        ("nll_rise:a>0.1", {"a": False}, "needs a set of texts, and 'a' is none"),
        ("ability_drop:b>0.1", {"a": False}, "needs the set 'b': name it as `--ability`; there are a."),
    ],
)
def test_rule_on_a_set_that_there_is_not_is_told(rule, sets, sentence):
    with pytest.raises(ValueError, match="needs") as error:
        on_sets(rules(rule), sets)
    assert sentence in str(error.value)


def test_other_figures_take_no_name():
    with pytest.raises(ValueError, match="no figure 'refusal_drop:fraud'"):
        Condition.parse("refusal_drop:fraud>0.1")
    assert str(Condition.parse("nll_rise:a.b-c>=.5")) == "nll_rise:a.b-c>=0.5"


def test_rules_that_so_few_rows_cannot_pass_are_told():
    conditions = on_sets(rules("ability_drop>0.05", "nll_rise>0"), SETS)
    told = hopeless(conditions, None, {"arc_challenge": 100, "my-facts": 20, "notes": 1})
    assert told == ["'ability_drop:my-facts>0.05' can't pass on 20 rows, even if no answer changes: it takes 59."]


def test_what_was_not_measured_is_not_passed():
    none = Ability("notes", "text", torch.zeros(0), torch.zeros(0), metadata={"unmeasured": 3})
    some = Ability("arc", "multiple choice", *[torch.ones(50).bool()] * 4, metadata={"unmeasured": 1})
    of = report(abilities=[none, some])
    verdict = judge(of, rules("nll_rise>10", "ability_drop>0.9"))
    assert [rule.outcome for rule in verdict.rules] == [Outcome.FAIL, Outcome.FAIL]
    assert "nll_rise:notes is not measured on 3 of 3 rows" in verdict.rules[0].sentence
    assert "notes                 not measured; 3 rows have no finite likelihood" in of.summary()
    assert "3 of 3 rows of notes have no finite likelihood." in not_measured(of)
    assert "nll_rise:notes" not in figures(of) and "| notes | 0 | not measured" in render_evidence(of, None, True)


def test_answers_that_were_cut_while_reasoning_are_told_as_such(tmp_path):
    none = Ability("gsm8k", "exact match", *[torch.zeros(0).bool()] * 2, metadata={"unmeasured": 3})
    right = torch.ones(50).bool()
    some = Ability("facts", "exact match", right, right.clone(), metadata={"unmeasured": 1})
    report(abilities=[none, some]).save_pretrained(tmp_path)
    of = DriftReport.from_pretrained(tmp_path)
    why = "have an answer that was cut off while reasoning (raise `--max-new-tokens`)"
    verdict = judge(of, rules("ability_drop>0.9"))
    assert [rule.outcome for rule in verdict.rules] == [Outcome.FAIL, Outcome.FAIL]
    assert verdict.rules[1].sentence == f"ability_drop:facts is not measured on 1 of 51 rows, which {why}."
    assert f"gsm8k                 not measured; 3 rows {why}" in of.summary()
    assert f"1 of 51 rows of facts {why}." in not_measured(of)
    assert "| gsm8k | 0 | not measured" in render_evidence(of, None, True) and eval_results(of)
    write_page(tmp_path / "page.html", of, verdict, base="base", tuned="tuned", command="agl-trl drift")
    assert "<h2>Abilities</h2>" in (tmp_path / "page.html").read_text()


def test_asking_stops_where_an_ability_has_decided():
    every, none = torch.ones(3).bool(), torch.zeros(3).bool()
    sides = (every, every, every, none, none)  # no prompt was asked yet
    broke = on_sets(rules("ability_drop:arc_challenge>0.02", "refusal_drop>0.05"), SETS)
    kept = on_sets(rules("ability_drop:my-facts>0.05", "refusal_drop>0.05"), SETS)
    assert certain_already(report(behaviour=None), broke, *sides)
    assert not certain_already(report(behaviour=None), kept, *sides)
    assert certain_already(report(behaviour=None), kept[:1], *sides)


@pytest.mark.parametrize("pieces", [1, 2])
def test_few_pieces_of_text_have_no_interval(pieces):
    """Half of the resamples of two have no error of their own."""
    whole = abilities_by_hand()[-1]
    few = replace(whole, base=whole.base[:pieces], tuned=whole.tuned[:pieces] + torch.arange(pieces) / 10)
    of = report(abilities=[few])
    assert "too few pieces for an interval)" in render_evidence(of, None, True)
    for text in (render_evidence(of, None, True), of.summary()):
        assert "inf " not in text and "inf)" not in text


def test_page_and_card_know_them(tmp_path):
    verdict = judge(report(), rules("ability_drop:arc_challenge>0.02"))
    write_page(tmp_path / "page.html", report(), verdict, base="base", tuned="tuned", command="agl-trl drift")
    page = (tmp_path / "page.html").read_text()
    assert "<h2>Abilities</h2>" in page and "100 of 1172" in page and "12 lost, 1 won" in page and "40 pieces" in page
    assert "<code>ability_drop:arc_challenge&gt;0.02</code>" in page
    assert "It is right on 69\u00a0% of arc_challenge; the base model on 80\u00a0%." in what_changed(report())
    assert ("ability set arc_challenge", "allenai/ai2_arc · cc-by-sa-4.0 · likelihood · SHA-256") in [
        (name, value.strip()) for name, value in facts(report())
    ]
    assert "What else it can do: no ability set was measured." in not_measured(report_by_hand())
    card = render_evidence(report(), None, True)
    assert (
        "| arc_challenge, multiple choice | 100 of 1172 | 80.0 % (71.1 to 86.7 %) | 69.0 % (59.4 to 77.2 %) | 12 / 1 | 0.0034 |"
        in card
    )
    assert (
        "| notes, NLL per token | 40 pieces | 2.000 | 2.100 (+0.100, " in card
        and "what else the model can do" not in card
    )
    assert "- arc_challenge: allenai/ai2_arc (cc-by-sa-4.0), likelihood." in card
    assert "what else the model can do." in render_evidence(report_by_hand(), None, True)
    found = {(e.dataset_name, e.metric_type, e.metric_name): e.metric_value for e in eval_results(report())}
    assert found["arc_challenge", "acc_norm", "Accuracy by likelihood per character, this adapter"] == 0.69
    assert found["my-facts", "exact_match", "Exact match, base model"] == 0.8
    assert found["notes", "nll", "NLL per token, this adapter, nats"] == pytest.approx(2.1)
