"""Conditions on a report: figures by hand, and what is not measured is not passed."""

import pytest
import torch

from agl_trl.drift.thresholds import Condition, figures
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
    ("condition", "met"),
    [
        ("refusal_drop>=0.75", True),
        ("refusal_drop>0.75", False),
        ("refusal_drop <= 7.5e-1", True),
        (" refusal_drop<.75 ", False),
        ("relative_drift>+1e-3", True),
        ("kl_safe>-1", True),
    ],
)
def test_comparison_is_the_one_that_was_written(condition, met):
    assert (Condition.parse(condition).holds(report_by_hand(behaviour_by_hand())) is not None) == met


def test_condition_that_is_met_is_told_in_a_sentence():
    report = report_by_hand(behaviour_by_hand())
    assert Condition.parse("refusal_drop >= 7.5e-1").holds(report) == "refusal_drop is 0.75, which is >= 0.75."


@pytest.mark.parametrize("condition", ["margin_drop_unsafe>100", "margin_drop_unsafe<-100"])
def test_what_was_not_measured_is_not_passed(condition):
    assert Condition.parse(condition).holds(report_by_hand(behaviour_by_hand()))


def test_figure_that_is_not_there_is_told():
    with pytest.raises(ValueError, match=r"no figure 'refusal_drop'; it has relative_drift, largest_drift\."):
        Condition.parse("refusal_drop>0.05").holds(report_by_hand())


@pytest.mark.parametrize(
    "text", ["refusal_drop", "refusal_drop=0.1", "refusal_drop>", "refusal_drop>a", ">1", "a>1>2"]
)
def test_what_is_no_condition_is_told(text):
    with pytest.raises(ValueError, match=f"'{text}' is no condition: write it like"):
        Condition.parse(text)
