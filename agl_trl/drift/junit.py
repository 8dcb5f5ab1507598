"""The verdict as JUnit writes it, which every CI shows: a test case for every rule."""

import re
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from ..artifacts.files import write_atomically
from .verdict import GateVerdict, Outcome


NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # not even escaped
ELEMENT = {Outcome.FAIL: "failure", Outcome.INSUFFICIENT: "skipped"}


def write_junit(path: Path, verdict: GateVerdict, tuned: str) -> None:
    """
    Write a verdict: what fails is a failure, what is undecided is skipped, each with its sentence.

    Args:
        path (`Path`):
            File.
        verdict ([`GateVerdict`]):
            Verdict.
        tuned (`str`):
            Name of the tuned model.

    Raises:
        `OSError`: If the file can't be written.
    """
    counts = {outcome: sum(rule.outcome is outcome for rule in verdict.rules) for outcome in Outcome}
    totals = {"tests": len(verdict.rules), "failures": counts[Outcome.FAIL], "skipped": counts[Outcome.INSUFFICIENT]}
    attributes = {"name": "agl-trl drift", "errors": "0", **{name: str(count) for name, count in totals.items()}}
    suites = Element("testsuites", attributes)
    suite = SubElement(suites, "testsuite", attributes)
    for rule in verdict.rules:
        case = SubElement(suite, "testcase", {"classname": _clean(tuned), "name": str(rule.condition)})
        text = _clean("\n".join([rule.sentence, *rule.slice_lines()]))
        if rule.outcome is Outcome.PASS:
            SubElement(case, "system-out").text = text
        else:
            found = SubElement(case, ELEMENT[rule.outcome], {"message": _clean(rule.sentence), "type": rule.outcome})
            found.text = text
    indent(suites)
    write_atomically(path, tostring(suites, encoding="utf-8", xml_declaration=True) + b"\n")


def _clean(text: str) -> str:
    """Text without what XML can't hold."""
    return NOT_XML.sub("�", text)
