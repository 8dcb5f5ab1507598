"""What `agl-trl drift` writes and says of a report, whoever gave the answers, and how it exits."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ..artifacts.files import FOLDER, PICTURE_FILE, write_atomically
from ..artifacts.location import shown_name
from ..drift.gate import judge
from ..drift.html import write_page
from ..drift.junit import write_junit
from ..drift.plots import plot_drift
from ..drift.report import DriftReport
from ..drift.thresholds import Condition
from ..drift.verdict import Outcome


ANSWERS_FILE = "answers.jsonl"
ABILITIES_FILE = "abilities.jsonl"


def write_drift(
    measured: DriftReport,
    conditions: Sequence[Condition],
    *,
    output_dir: Path,
    unfinished: Path,
    base: str,
    tuned: str,
    options: dict[str, Any],
    html: Path | None = None,
    with_answers: bool = False,
    junit: Path | None = None,
) -> None:
    """
    Write report, picture, answers to prompts and of ability sets; print summary and verdict; write JUnit file and page, which no
    verdict waits for.

    Args:
        measured ([`DriftReport`]):
            Report.
        conditions (`Sequence[Condition]`):
            Rules.
        output_dir (`Path`):
            Folder of what is written.
        unfinished (`Path`):
            Answers of an interrupted run, which go when the report is there.
        base, tuned (`str`):
            Names of the models.
        options (`dict`):
            What [`command_line`] tells.
        html, with_answers, junit:
            As in [`drift`].

    Raises:
        `OSError`: If a file can't be written.
        `typer.Exit`: With the exit code of a verdict that is not *pass*.
    """
    answers = [] if measured.behaviour is None else measured.behaviour.answers
    tables = {ANSWERS_FILE: answers, ABILITIES_FILE: [row for one in measured.abilities for row in one.answers]}
    for name, rows in tables.items():
        if rows:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            write_atomically(output_dir / name, "".join(lines).encode())
    measured.save_pretrained(output_dir)
    # Only now: where a file can't be written, nothing has to be asked again.
    unfinished.unlink(missing_ok=True)
    for name, rows in tables.items():
        if not rows:  # of an earlier run into this folder
            (output_dir / name).unlink(missing_ok=True)
    plot_drift(measured, output_dir / FOLDER / PICTURE_FILE)
    typer.echo(measured.summary())
    verdict = judge(measured, conditions) if conditions else None
    if verdict is not None:
        typer.echo("\n".join(verdict.lines()))
        if junit is not None:
            write_junit(junit, verdict, tuned=shown_name(tuned))
    if html is not None:
        write_page(
            html,
            measured,
            verdict,
            base=shown_name(base),
            tuned=shown_name(tuned),
            command=command_line(**options),
            with_answers=with_answers,
        )
    if verdict is not None and verdict.outcome is not Outcome.PASS:
        typer.echo(f"agl-trl: {verdict.sentence()}", err=True)
        raise typer.Exit(verdict.outcome.exit_code)


def command_line(**options: Any) -> str:
    """The command that measures the same again, without folders of this machine."""
    words = ["agl-trl", "drift"]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif name in ("fail_if", "ability"):
            words += [word for one in value for word in (option, shown_name(str(one)))]
        elif value is not None and value is not False:
            words += [option, shown_name(value) if isinstance(value, str) else str(value)]
    return shlex.join([*words, "--output-dir", "report"])
