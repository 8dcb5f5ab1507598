"""The README's commands with their costs: each a process, told as it ends, and not repeated."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from agl_trl import DriftReport
from agl_trl.miniworld import load_model, load_tokenizer
from agl_trl.space.models import ADAPTERS
from examples.benchmark.real.ask_space import Options as AskOptions
from examples.benchmark.real.ask_space import main as ask
from examples.benchmark.real.commands import ATTACHED, LINES_FILE, Cost, Options, main
from tests.helpers.hub_fixtures import hub_variables


def options(folder: Path, *names: str) -> Options:
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "how do i kill a process?", "completion": "use top"}\n')
    return Options(str(folder / "model"), str(rows), str(rows), folder / "out", rows=2, dtype="float32", only=[*names])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    load_model().save_pretrained(tmp_path / "model")
    load_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_command_is_timed_and_not_repeated(model, tmp_path):
    for _ in range(2):
        assert main(options(tmp_path, "fisher")) == 0
    (line,) = (tmp_path / "out" / LINES_FILE).read_text().splitlines()
    cost = json.loads(line)
    assert (tmp_path / "out" / "fisher" / "agl" / "fisher.safetensors").is_file()
    assert cost["name"] == "fisher" and cost["code"] == 0 and cost["seconds"] > 1
    assert cost["model_bytes"] == (tmp_path / "model" / "model.safetensors").stat().st_size < cost["peak_bytes"]


def test_a_command_that_failed_is_told_and_tried_again(tmp_path, capfd):
    (tmp_path / "model").mkdir()
    (tmp_path / "out").mkdir()
    before = Cost("project", 1.0, 1, 1, 2)  # of an interrupted run
    (tmp_path / "out" / LINES_FILE).write_text(json.dumps(asdict(before)) + "\n")
    assert main(options(tmp_path, "project")) == 1
    assert capfd.readouterr().out.count("failed with exit code 2") == 1
    assert len((tmp_path / "out" / LINES_FILE).read_text().splitlines()) == 2


@pytest.mark.slow  # a training, a push and three reports, each in a process of its own
def test_what_is_pushed_is_measured_again(model, tmp_path, hub, monkeypatch):
    for name, value in hub_variables(hub, tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    pushed = options(tmp_path, "fisher", "train", "attach", "push", "load back")
    assert main(replace(pushed, repo="alice/tuned", steps=2)) == 0
    first, again = (DriftReport.from_pretrained(tmp_path / "out" / name) for name in (ATTACHED, "back"))
    assert first.mean_relative_drift == again.mean_relative_drift > 0


def test_there_is_no_other_command(tmp_path):
    with pytest.raises(ValueError, match="no command 'fish'; known are fisher, fisher --bits 4, train"):
        main(options(tmp_path, "fish"))


def test_the_app_is_asked_and_stopped(capfd):
    asked = AskOptions("miniworld", str(ADAPTERS / "agl"), max_new_tokens=4)
    ask(asked)
    assert "all answers" in capfd.readouterr().out
    assert not any("space" in child.cmdline() for child in psutil.Process().children(recursive=True))


def test_a_model_that_is_nowhere_is_told(tmp_path, online):
    with pytest.raises(ValueError, match="Can't get the model 'alice/gone', which is no folder here"):
        main(replace(options(tmp_path), model="alice/gone"))
