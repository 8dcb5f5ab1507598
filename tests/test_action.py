"""The GitHub Action: its own steps, run one by one with bash as a runner does, on the embedded world."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tests.helpers.github_server import serving


ROOT = Path(__file__).parents[1]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS = ACTION["runs"]["steps"]
GIVEN = {"github.token": "a-token", "github.event.pull_request.number": "12"}
EXPRESSION = re.compile(r"\$\{\{\s*([\w.-]+)\s*\}\}")


def evaluated(text: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
    """A value with the expressions that the action uses."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name == "github.action_path":
            return str(ROOT)
        if name in GIVEN:
            return GIVEN[name]
        if name.startswith("steps.measure.outputs."):
            return outputs.get(name.rpartition(".")[2], "")
        assert name.startswith("inputs."), f"no such expression: {name}"
        return evaluated(inputs[name.partition(".")[2]], inputs, outputs)

    return EXPRESSION.sub(value, text)


class Runner:
    """A runner of composite actions, as far as ours needs one: variables, output and summary files, and the exit code."""

    def __init__(self, folder: Path, **given: str):
        self.folder, self.outputs, self.said = folder, {}, ""
        given = {name.replace("_", "-"): value for name, value in given.items()}
        assert {*given} <= {*ACTION["inputs"]}
        self.inputs = {name: str(one.get("default", "")) for name, one in ACTION["inputs"].items()} | given

    def run(self, step: dict[str, Any], **environment: str) -> int:
        output, summary, script = (self.folder / name for name in ("output", "summary", "script.sh"))
        output.write_text("")
        summary.touch()
        script.write_text(step["run"])
        names = {key: evaluated(str(value), self.inputs, self.outputs) for key, value in step.get("env", {}).items()}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        files = {"GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary)}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            check=False,
            cwd=self.folder,
            env=os.environ | {"PATH": path} | files | names | environment,
            capture_output=True,
            text=True,
        )
        self.said += done.stdout + done.stderr
        if step.get("id") == "measure":
            self.outputs = dict(line.split("=", 1) for line in output.read_text().splitlines())
        return done.returncode

    def run_all(self) -> int:
        """Measure and say the verdict, as a workflow does; the package is installed already."""
        measure, verdict = (step for step in STEPS if step.get("name") in ("Measure", "Verdict"))
        assert self.run(measure) == 0, self.said
        return self.run(verdict)

    @property
    def summary(self) -> str:
        return (self.folder / "summary").read_text()


@pytest.fixture
def world(tmp_path, demo_folder) -> dict[str, str]:
    return {
        "base": "miniworld",
        "adapter": str(demo_folder / "lora"),
        "fisher": str(demo_folder),
        "prompts": "miniworld",
        "limit": "8",
        "max_new_tokens": "8",
    }


def test_no_input_is_text_of_a_script():
    for step in STEPS:
        assert "${{" not in step.get("run", ""), step
        assert "run" not in step or step["shell"] == "bash"
    used = {name for step in STEPS for name in re.findall(r"inputs\.([\w-]+)", str(step))}
    assert used == {*ACTION["inputs"]}, "every input is used, and every one that is used is declared"


def test_answers_stay_where_they_were_made():
    (upload,) = (step for step in STEPS if "upload-artifact" in step.get("uses", ""))
    assert "answers" not in upload["with"]["path"] and "drift.html" in upload["with"]["path"]


def test_install_finds_the_package_in_the_action(tmp_path):
    """By pip itself, which is told by its own variables to stop before it changes this environment."""
    (install,) = (step for step in STEPS if step.get("name") == "Install")
    runner = Runner(tmp_path)
    dry = {"PIP_DRY_RUN": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_QUIET": "0", "PIP_VERBOSE": "1"}
    assert runner.run(install, **dry) == 0, runner.said
    assert f"Processing {ROOT}" in runner.said, runner.said


def test_pass_fail_and_too_few_prompts(world, tmp_path):
    passed = Runner(tmp_path, **world, fail_if="relative_drift>100\n\n  largest_drift>100  \n")
    assert passed.run_all() == 0 and passed.outputs == {"exit-code": "0", "verdict": "pass"}
    report = tmp_path / "drift-report"
    assert (
        "<!doctype html>" in (report / "drift.html").read_text() and (report / "agl" / "drift.safetensors").is_file()
    )
    assert len([*ElementTree.parse(report / "junit.xml").iter("testcase")]) == 2
    assert "### Drift: pass\n\n    relative drift " in passed.summary and "relative_drift>100" in passed.summary
    failed = Runner(tmp_path, **world, fail_if="relative_drift>1e-9")
    assert failed.run_all() == 1 and failed.outputs["verdict"] == "fail" and "Failed: relative_drift" in failed.said
    few = {**world, "fail_if": "refusal_drop>0.05", "sequential": "true"}
    undecided = Runner(tmp_path, **few)
    assert undecided.run_all() == 3 and undecided.outputs["verdict"] == "insufficient evidence"
    allowed = Runner(tmp_path, **few, insufficient_evidence="pass")
    assert allowed.run_all() == 0 and "::warning::" in allowed.said


def test_the_pull_request_gets_one_comment(world, tmp_path):
    (step,) = (step for step in STEPS if step.get("name") == "Comment")
    assert "github.event.pull_request.number" in step["if"] and "inputs.comment == 'true'" in step["if"]
    where = {"GITHUB_REPOSITORY": "me/model", "GITHUB_SERVER_URL": "https://github.com", "GITHUB_RUN_ID": "7"}
    with serving() as github:
        where["GITHUB_API_URL"] = github.url
        (tmp_path / "typer.py").write_text("raise SystemExit('of the checked-out tree, beside the token')")
        runner = Runner(tmp_path, **world | {"prompts": ""}, fail_if="relative_drift>100")
        runner.run_all()
        assert runner.run(step, **where) == 0 and f"Comment: {github.url}/c/1" in runner.said, runner.said
        (made,) = github.comments
        assert "### Drift: pass\n\n    relative drift " in made["body"]
        assert "(https://github.com/me/model/actions/runs/7)" in made["body"]
        (tmp_path / "drift-report" / "summary.md").write_text("### Drift: fail\n")  # of a later run
        assert runner.run(step, **where) == 0 and "### Drift: fail" in made["body"] and len(github.comments) == 1
        github.status = 403  # of a fork
        refused = Runner(tmp_path, **world)
        assert refused.run(step, **where) == 0 and "::warning::The workflow may not comment" in refused.said


def test_what_is_no_command_is_not_run(world, tmp_path):
    """Inputs that a script would run if they were text of it."""
    marker = tmp_path / "was-run"
    evil = f"$(touch {marker})`touch {marker}`\"; touch {marker}; '--help"
    runner = Runner(tmp_path, **world | {"adapter": evil, "prompts": evil}, fail_if=evil, judge=evil)
    assert runner.run_all() == 2 and runner.outputs == {"exit-code": "2", "verdict": "error"}
    assert not marker.exists() and "is no condition" in runner.said
    assert runner.summary.startswith("### Drift: error")


def test_where_nothing_was_measured_the_workflow_stops(tmp_path):
    verdict = STEPS[-1]
    assert verdict["if"] == "${{ always() }}" and Runner(tmp_path).run(verdict) == 2
