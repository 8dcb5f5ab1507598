"""What a run was held to, in a report: read back as it was written, told in the summary, and checked."""

import pytest

from agl_trl import DriftReport
from agl_trl.artifacts.files import ArtifactError
from agl_trl.drift.protected import over_budget, protected_lines
from tests.helpers.render_sample_card import held_report


def test_summary_says_what_was_held_of_a_report_that_was_saved(tmp_path):
    report = held_report()
    report.save_pretrained(tmp_path)
    read = DriftReport.from_pretrained(tmp_path)
    assert read.metadata["protected"] == report.metadata["protected"]
    lines = read.summary().splitlines()
    assert "KL, protected rows    1.95e-02 nats per answer token, budget 0.02  (alignment, 128 rows)" in lines
    assert "  of these            to answer 1.80e-02, to refuse 2.10e-02, first five tokens 2.50e-02" in lines
    assert "KL, protected rows    4.00e-03 nats per answer token, budget 0.01  (text, 64 rows)" in lines
    assert "shrunk at the end     to 0.900 of the update, to hold the budget" in lines
    assert not any("NOT held" in line for line in lines)


def test_what_was_not_measured_or_not_held_is_said():
    before = {"behaviours": {"alignment": {"budget": 0.02}, "text": {"budget": None}}, "scale": None}
    assert protected_lines(before) == [
        "KL, protected rows    not measured (alignment, budget 0.02)",
        "KL, protected rows    not measured (text, no budget)",
    ]
    kept = {"budget": 0.02, "kl": 0.03, "kl_first_tokens": 0.03, "rows": 4, "kinds": {}}
    broken = {"behaviours": {"alignment": kept, "text": kept | {"budget": 0.03}}, "scale": 1.0}
    assert over_budget(broken) == ["alignment"], "at the budget is within it"
    assert protected_lines(broken)[-1].startswith("NOT held              alignment: what was trained beside LoRA")
    assert not any("shrunk" in line for line in protected_lines(broken))


@pytest.mark.parametrize("name", ["a|b", "two\nlines", "", "x" * 61])
def test_names_of_others_are_checked(name, tmp_path):
    for where in ("behaviour", "kind"):
        report, kept = held_report(), {"budget": 0.1, "kl": 0.01, "kinds": {}}
        behaviours = {name: kept} if where == "behaviour" else {"alignment": kept | {"kinds": {name: 0.01}}}
        report.metadata["protected"]["behaviours"] = behaviours
        report.save_pretrained(tmp_path)
        with pytest.raises(ArtifactError, match="is no name of a behaviour"):
            DriftReport.from_pretrained(tmp_path)
