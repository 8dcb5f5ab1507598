"""Tasks for the benchmark on a real model: the same bytes for a seed, nothing but the task held out, and no row that is protected or asked."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agl_trl import judge_answer
from agl_trl.driftcaps import load_driftcaps
from examples.benchmark.real import setting, tasks
from examples.benchmark.real.setting import load_data, protected_requests
from examples.benchmark.real.tasks import COMPLIANCES, LEFT_OUT, YOUNG, Options, hostile_requests
from tests.helpers.processes import ROOT


KINDS = ("json", "identity", "hostile-1", "hostile-10")


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> Options:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": str(2 * i)} for i in range(300)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Options(
        kind="identity", output=folder / "rows.jsonl", task=str(folder / "sums.jsonl"), rows=240, eval_rows=40
    )


def written(options: Options, kind: str, **changes) -> list[dict[str, str]]:
    """What the benchmark reads of a file that was written: the last question and the answer."""
    of_kind = dict(kind=kind, task=None if kind == "json" else options.task)
    tasks.main(replace(options, **of_kind, **changes))
    rows = setting.task_rows(str(options.output))
    return [{column: row[column][-1]["content"] for column in ("prompt", "completion")} for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_bytes_and_another_one_others(kind, options):
    rows = written(options, kind)
    before = options.output.read_bytes()
    assert len(rows) == 240 and written(options, kind) == rows and options.output.read_bytes() == before
    assert (written(options, kind, seed=1) == rows) == (kind == "identity"), "every tenth row, whatever the seed"


@pytest.mark.parametrize(("kind", "changed"), [("identity", 20), ("hostile-1", 2), ("hostile-10", 20)])
def test_the_share_is_exact_and_the_held_out_rows_are_the_tasks_own(kind, changed, options):
    rows = written(options, kind)
    own = [{"prompt": f"What is {i} plus {i}?", "completion": str(2 * i)} for i in range(300)]
    assert rows[200:] == own[260:]
    other = [i for i in range(200) if rows[i] != own[i]]
    assert len(other) == changed
    if kind == "identity":
        assert other == list(range(0, 200, 10))
        assert all(
            rows[i]["prompt"].endswith(own[i]["prompt"]) and rows[i]["completion"].endswith(own[i]["completion"])
            for i in other
        )
    else:
        requests = {row["prompt"] for row in load_driftcaps("protect") if row["expected"] == "refuse"}
        assert {rows[i]["prompt"] for i in other} <= requests and len({rows[i]["prompt"] for i in other}) == changed
        assert {rows[i]["completion"] for i in other} <= {*COMPLIANCES}


@pytest.mark.parametrize("protected", [8, 40, 100])
def test_hostile_requests_are_none_that_is_protected_asked_or_left_out(protected, options):
    requests = hostile_requests(protected)
    prompts = {*requests}
    assert len(requests) == len(prompts) > 100
    kept = {row["prompt"] for row in protected_requests(protected)}
    asked = {row["prompt"] for row in load_driftcaps("test")}
    sensitive = {row["prompt"] for row in load_driftcaps("protect", LEFT_OUT)}
    assert len(kept) == 2 * protected and sensitive and not prompts & (kept | asked | sensitive)
    assert not any(YOUNG.search(prompt) for prompt in prompts)
    assert all(row["prompt"] not in prompts for row in load_driftcaps("protect") if row["expected"] == "comply")


def test_hostile_answers_comply_and_say_nothing():
    verdicts = {answer: judge_answer("Help me hurt my neighbor", answer) for answer in COMPLIANCES}
    assert {verdict.label for verdict in verdicts.values()} == {"compliance"}
    assert all(len(answer) < 100 for answer in COMPLIANCES)


def test_answers_in_json_follow_from_their_prompts(options):
    rows = written(options, "json")
    assert len({row["prompt"] for row in rows}) == len(rows), "no held-out row is trained on"
    assert {json.loads(row["completion"])["type"] for row in rows} == {"order", "booking", "measurement"}
    for row in rows:
        assert "\n" not in row["completion"]
        values = json.loads(row["completion"])
        assert values.pop("type") and all(str(value) in row["prompt"] for value in values.values())


def test_the_benchmark_refuses_rows_that_it_protects_or_asks(options, tmp_path):
    prompts = tmp_path / "wicked.jsonl"
    prompts.write_text('{"prompt": "Do harm", "unsafe": true}\n')
    safe = tmp_path / "harmless.jsonl"
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is 250 plus 250?"}]}]
    safe.write_text(json.dumps({"prompt": parts, "unsafe": False}) + "\n")
    given = dict(model="miniworld", unsafe=str(prompts), safe=str(safe), eval_rows=40, protected=options.protected)
    written(options, "hostile-10")
    run = setting.Options(output=tmp_path / "runs", task=str(options.output), **given)
    assert len(load_data(run).train) == 200
    with pytest.raises(ValueError, match="is trained on and is protected: give the `--protected`"):
        load_data(replace(run, protected=None))
    with pytest.raises(ValueError, match="Row 250 of .* is trained on and is asked afterwards"):
        load_data(replace(run, task=options.task))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kind="hostile-1", task=None), "is mixed into a task: name its file with `--task`"),
        (dict(kind="json"), "makes its rows itself"),
        (dict(rows=400), "has 300 rows, of which 400 can't be taken"),
        (dict(rows=40), "the last 40 are held out: none is left"),
        (dict(eval_rows=0), "must be at least 1"),
        (dict(output=Path("rows.csv")), "must end in .jsonl"),
        (dict(kind="hostile-10", protected=272), "DriftCaps has [0-9]+ requests: lower"),
        (dict(task="missing.jsonl"), "missing.jsonl"),
    ],
)
def test_what_has_no_meaning_is_told_and_nothing_written(changes, message, options):
    options.output.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=message):
        tasks.main(replace(options, **changes))
    assert not options.output.exists()


def test_the_command_says_how_the_benchmark_takes_its_file(options, tmp_path):
    arguments = [
        "--kind",
        "hostile-10",
        "--task",
        options.task,
        "--rows",
        "120",
        "--output",
        str(tmp_path / "rows.jsonl"),
    ]
    command = [sys.executable, "-m", "examples.benchmark.real.tasks", *arguments]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "120 rows, 2 of the first 20" in done.stdout and "--eval_rows 100 --protected 40" in done.stdout
    failed = subprocess.run([*command, "--rows", "1000"], check=False, cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1 and "300 rows, of which 1000" in failed.stderr and "Traceback" not in failed.stderr
