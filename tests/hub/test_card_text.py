"""Text of cards: names of others that do nothing, templates that lack nothing, settings of reports old and new."""

from dataclasses import asdict
from importlib.resources import files

import pytest
from jinja2 import UndefinedError

from agl_trl.hub.card_text import describe_settings, plain, render, render_adapter
from agl_trl.objective.alignguard import Coefficients
from tests.helpers.render_sample_card import made_up_report


def test_names_of_others_are_shown_and_do_nothing():
    assert plain("illegal_goods") == "illegal_goods" and plain("a\u202eb\x00c") == "abc"
    assert plain("a|b [l](http://x) <b>") == r"a\|b \[l\](http://x) &lt;b&gt;"


def test_a_missing_value_is_an_error_and_templates_are_in_the_package():
    with pytest.raises(UndefinedError):
        render("statistics.md.jinja", name="n")
    for name in ("adapter", "citation", "evidence", "statistics"):
        assert files("agl_trl.model_cards").joinpath(f"{name}.md.jinja").is_file()


def test_settings_are_told_as_they_were():
    complete = asdict(Coefficients(alignment=0.1, task=0.1))
    assert describe_settings(complete | {"variant": "kfac", "drift_budget": 0.003}) == (
        "alignment penalty λ_A = 0.1 on the complete Fisher quadratic form, drift budget 0.003"
    )
    parts = asdict(Coefficients(alignment=0.2, task=0.1, collision=0.5, fisher_energy=0.8))
    assert describe_settings(parts) == (
        "alignment 0.2, task 0.1, task_metric rest, task_subspace complement, collision 0.5, alpha 0.5, fisher_energy 0.8"
    )
    anchored = asdict(Coefficients(alignment=0.0, task=0.0)) | {"anchor_coef": 0.3, "anchor_every": 4}
    assert describe_settings(anchored) == "anchor 0.3 every 4 steps"
    assert "as published" in describe_settings({"variant": "paper"})


def test_reports_of_older_versions_lack_coefficients():
    """Of before there was a choice of subspaces, and of before the terms were told apart."""
    older = {"variant": "kfac", "alignment": 0.2, "task": 0.1, "collision": 0.0, "alpha": 0.5, "anchor_coef": 0.3}
    assert describe_settings(older) == (
        "alignment 0.2, task 0.1, task_metric rest, task_subspace complement, collision 0.0, alpha 0.5, fisher_energy 0.9, "
        "anchor 0.3"
    )
    assert describe_settings({"alignment": 0.1}) == "alignment penalty λ_A = 0.1 on the complete Fisher quadratic form"
    assert describe_settings({"drift_budget": 0.003, "unknown": 1}) == "drift budget 0.003"
    report = made_up_report()
    report.metadata["coefficients"] = older
    assert "task_subspace complement" in render_adapter("n", report, None, None)
    report.metadata["coefficients"] = {}
    assert "(AlignGuard-LoRA in TRL). The aim" in render_adapter("n", report, None, None)
