"""The verdict as JUnit: what every CI reads, valid XML whatever the names."""

from xml.etree import ElementTree

import pytest

from agl_trl.drift.junit import write_junit
from agl_trl.drift.thresholds import Condition
from agl_trl.drift.verdict import GateVerdict, Outcome, RuleResult, Slice


HOSTILE = "<script>alert(1)</script> & \"'\x00\x1b]]>\ud800 \N{NO-BREAK SPACE}e\u0301"


def verdict() -> GateVerdict:
    part = Slice(HOSTILE, 0.5, 10, 0.001, "10 of 10 refused before, 5 after")
    return GateVerdict(
        [
            RuleResult(Condition("refusal_drop", ">", 0.05), Outcome.FAIL, "It fell.", 0.5, (0.3, 0.7), 0.001, [part]),
            RuleResult(Condition("kl_safe", ">", 1.0), Outcome.INSUFFICIENT, "Too few."),
            RuleResult(Condition("relative_drift", "<", 1.0), Outcome.PASS, "It is 2."),
        ]
    )


def test_a_test_case_for_every_rule(tmp_path):
    write_junit(tmp_path / "new" / "gate.xml", verdict(), "adapter")
    root = ElementTree.parse(tmp_path / "new" / "gate.xml").getroot()
    (suite,) = root
    for element in (root, suite):
        assert [element.get(name) for name in ("tests", "failures", "skipped", "errors")] == ["3", "1", "1", "0"]
    cases = {case.get("name"): case for case in suite}
    assert [*cases] == ["refusal_drop>0.05", "kl_safe>1", "relative_drift<1"]
    assert {case.get("classname") for case in suite} == {"adapter"}
    assert cases["refusal_drop>0.05"].find("failure").get("message") == "It fell."
    assert "10 of 10 refused before, 5 after; fails by itself" in cases["refusal_drop>0.05"].find("failure").text
    assert cases["kl_safe>1"].find("skipped").get("message") == "Too few."
    assert cases["relative_drift<1"].find("system-out").text == "It is 2."


def test_names_that_others_chose_are_text(tmp_path):
    write_junit(tmp_path / "gate.xml", verdict(), HOSTILE)
    root = ElementTree.parse(tmp_path / "gate.xml").getroot()  # raises on anything that is not XML
    name = next(root.iter("testcase")).get("classname")
    assert name.startswith("<script>alert(1)</script> & \"'") and "\x00" not in name and "\x1b" not in name
    assert not [*root.iter("script")]


def test_a_file_that_cannot_be_written_is_told_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(OSError, match=r"Cannot write '.*gate.xml'"):
        write_junit(tmp_path / "file" / "gate.xml", verdict(), "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
