"""Conditions on a report: figures by hand, and what is not measured is not passed."""

import pytest
import torch

from agl_trl.drift.thresholds import Condition, change, check_measurable, figures
from tests.helpers.reports import behaviour_by_hand, report_by_hand


def test_figures_by_hand():
    assert figures(report_by_hand()) == pytest.approx({"relative_drift": 2.5e-3, "largest_drift": 4e-3})
    expected = {
        "relative_drift": 2.5e-3,
        "largest_drift": 4e-3,
        "refusal_drop": 3 / 4,
        "kl_unsafe": 0.25,
        "nll_rise_unsafe": 0.75,
        "margin_drop_unsafe": torch.nan,
        "over_refusal_rise": 1 / 3,
        "kl_safe": 0.1,
        "nll_rise_safe": 0.25,  # of the rows that have an answer
        "margin_drop_safe": torch.nan,
    }
    assert figures(report_by_hand(behaviour_by_hand())) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("refusal_drop>=0.75", ("refusal_drop", ">=", 0.75)),
        (" refusal_drop<.75 ", ("refusal_drop", "<", 0.75)),
        ("refusal_drop <= 7.5e-1", ("refusal_drop", "<=", 0.75)),
        ("relative_drift>+1e-3", ("relative_drift", ">", 1e-3)),
        ("kl_safe>-1", ("kl_safe", ">", -1)),
    ],
)
def test_condition_is_the_one_that_was_written(text, condition):
    assert Condition.parse(text) == condition and Condition.parse(str(Condition.parse(text))) == condition


@pytest.mark.parametrize(
    "text", ["refusal_drop", "refusal_drop=0.1", "refusal_drop>", "refusal_drop>a", ">1", "a>1>2"]
)
def test_what_is_no_condition_is_told(text):
    with pytest.raises(ValueError, match=f"'{text}' is no condition: write it like"):
        Condition.parse(text)


@pytest.mark.parametrize("figure", ["refusal_drop", "over_refusal_rise", "ability_drop", "ability_drop:gsm8k"])
@pytest.mark.parametrize(("limit", "share"), [("5", "5 % is 0.05"), ("1", "1 % is 0.01"), ("-10", "-10 % is -0.1")])
def test_a_limit_that_no_share_can_reach_is_told(figure, limit, share):
    with pytest.raises(ValueError) as error:
        Condition.parse(f"{figure}>{limit}")
    assert str(error.value) == f"'{figure}>{limit}' has no share between -1 and 1: {share}."
    assert Condition.parse(f"{figure}>0.99").limit == 0.99


def test_figure_that_no_report_has_is_told_at_once():
    with pytest.raises(ValueError, match="no figure 'refusals' to set a limit on; there are relative_drift, "):
        Condition.parse("refusals>1")


@pytest.mark.parametrize(
    ("condition", "unsafe", "sentence"),
    [
        ("refusal_drop>0.05", None, "needs unsafe prompts: name some as `--prompts`"),
        ("over_refusal_rise>0.05", [True, True], "needs safe prompts: these are all unsafe"),
        ("kl_unsafe>1", [False], "needs unsafe prompts: these are all safe"),
    ],
)
def test_prompts_that_a_rule_needs_are_missed_before_they_are_asked(condition, unsafe, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_measurable([Condition.parse(condition)], None if unsafe is None else torch.tensor(unsafe))
    check_measurable([Condition.parse("relative_drift>1")], None)
    check_measurable([Condition.parse(condition)], torch.tensor([True, False]))


def test_change_of_a_rate_by_hand():
    behaviour = behaviour_by_hand()
    assert change(behaviour, "refusal_drop") == (3, 0, 4, 0, 0)
    assert change(behaviour, "refusal_drop", "weapons") == (0, 0, 1, 0, 0)
    assert change(behaviour, "over_refusal_rise") == (1, 0, 3, 0, 0)
    assert change(behaviour, "refusal_drop", "look-alike") is None, "these are safe"
    assert change(behaviour, "nll_rise_safe").values.tolist() == [0.0, 0.5], "the third has no answer"


def test_prompts_that_were_not_asked_may_still_change_either_way():
    behaviour = behaviour_by_hand()
    behaviour.metadata["unasked"] = {
        "unsafe": {"refused": 5, "answered": 2},
        "safe": {"refused": 1, "answered": 6},
    }
    assert change(behaviour, "refusal_drop") == (3, 0, 11, 5, 2), "one that is refused may be lost"
    assert change(behaviour, "over_refusal_rise") == (1, 0, 10, 6, 1), "one that is answered may be refused"
    assert change(behaviour, "kl_safe").unasked == 7
    assert figures(report_by_hand(behaviour))["refusal_drop"] == 3 / 4, "the figure is of those that were asked"
