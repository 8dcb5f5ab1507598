"""What `agl-trl drift` leaves behind: nothing of an earlier run, and where a file can't be written, answers and verdict."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer

from agl_trl.cli.drift_written import write_drift
from agl_trl.drift.report import DriftReport
from agl_trl.drift.thresholds import Condition
from tests.helpers.reports import abilities_by_hand, behaviour_by_hand, report_by_hand


RULE = Condition("relative_drift", ">", 1e-9)


def write(folder: Path, measured: DriftReport, *conditions: Condition, **options) -> None:
    names = dict(base="base", tuned="tuned", options={})
    write_drift(measured, conditions, output_dir=folder, unfinished=folder / "unfinished-1.jsonl", **names, **options)


def measured() -> DriftReport:
    answers = replace(behaviour_by_hand(), answers=[{"id": "0"}])
    return replace(
        report_by_hand(answers), abilities=[replace(one, answers=[{"row": 0}]) for one in abilities_by_hand()]
    )


def test_answers_are_kept_until_the_report_is_there(tmp_path):
    unfinished = tmp_path / "unfinished-1.jsonl"
    unfinished.write_text("answers")
    with pytest.raises(ValueError, match="the relative drift is not finite"):
        write(tmp_path, replace(measured(), relative_drift=torch.full((4,), torch.nan)))
    assert unfinished.read_text() == "answers"
    (tmp_path / "agl").write_text("a file where a folder should be")
    with pytest.raises(OSError):
        write(tmp_path, measured())
    assert unfinished.read_text() == "answers"
    (tmp_path / "agl").unlink()
    write(tmp_path, measured())
    assert not unfinished.exists() and (tmp_path / "agl" / "drift.safetensors").is_file()


def test_answers_of_an_earlier_run_do_not_lie_beside_a_report_without_them(tmp_path):
    write(tmp_path, measured())
    assert {path.name for path in tmp_path.iterdir()} == {"agl", "answers.jsonl", "abilities.jsonl"}
    write(tmp_path, replace(measured(), abilities=[]))
    assert {path.name for path in tmp_path.iterdir()} == {"agl", "answers.jsonl"}
    write(tmp_path, report_by_hand())
    assert {path.name for path in tmp_path.iterdir()} == {"agl"}


def test_no_verdict_is_lost_with_the_page(tmp_path, capsys):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OSError):
        write(tmp_path, report_by_hand(), RULE, html=tmp_path / "page.html", junit=tmp_path / "gate.xml")
    assert (
        "verdict               FAIL" in capsys.readouterr().out
        and 'failures="1"' in (tmp_path / "gate.xml").read_text()
    )
    with pytest.raises(typer.Exit) as verdict:
        write(tmp_path, report_by_hand(), RULE, html=tmp_path / "other.html")
    assert verdict.value.exit_code == 1 and (tmp_path / "other.html").is_file()
