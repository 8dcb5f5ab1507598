"""`agl-trl drift --ability`: what it writes, its verdicts, and what is wrong with it, on the adapter of the package's Space."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

import agl_trl
from agl_trl import DriftReport
from agl_trl.data.alignment import driftcaps_requests
from agl_trl.miniworld import task_dataset
from tests.helpers.commands import command


ADAPTER = Path(agl_trl.__file__).parent / "space" / "adapters" / "plain"  # learned to extract


@pytest.fixture
def few_requests(monkeypatch):
    """Statistics from few rows: they are not what this is about."""
    monkeypatch.setattr("agl_trl.cli.drift.driftcaps_requests", lambda: driftcaps_requests().select(range(8)))


@pytest.fixture
def sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in task_dataset("extract", "test")]
    cities = sorted({json.loads(answer)["city"] for _, answer in rows})
    right = [json.loads(answer)["city"] for _, answer in rows]
    questions = [
        {"question": question, "choices": [city, *[c for c in cities if c != city][:3]], "answer": "A"}
        for (question, _), city in zip(rows[:30], right, strict=False)
    ]
    prompts = [{"prompt": question, "answer": answer} for question, answer in rows[:30]]
    for name, found in (("cities", questions), ("extract", prompts)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    Path("notes.txt").write_text("\n".join(question for question, _ in rows))
    Path("one.jsonl").write_text(json.dumps({"question": "q", "choices": ["a"], "answer": "a"}))
    Path("empty.jsonl").write_text("")
    return tmp_path


def test_sets_are_measured_saved_told_and_judged(sets, few_requests, monkeypatch, capsys):
    named = ("--ability", "cities.jsonl", "--ability", "extract.jsonl", "--ability", "notes.txt")
    arguments = (
        "drift",
        "--base",
        "miniworld",
        "--adapter",
        ADAPTER,
        *named,
        "--output-dir",
        "out",
        "--html",
        "page.html",
    )
    good = ("--fail-if", "ability_drop:extract>0.1", "--junit", "gate.xml")
    code, out, err = command(monkeypatch, capsys, *arguments, *good)
    assert code == 0 and "0.0% right before, 100.0% after" in out and "ability_drop:extract>0.1 pass" in out, err
    assert sorted(path.name for path in Path("out").iterdir()) == ["abilities.jsonl", "agl"]
    report = DriftReport.from_pretrained("out")
    assert [(one.name, one.kind) for one in report.abilities] == [
        ("cities", "multiple choice"), ("extract", "exact match"), ("notes", "text"),
    ]  # fmt: skip
    rows = [json.loads(line) for line in Path("out/abilities.jsonl").read_text().splitlines()]
    assert len(rows) == 60 and all(len(row["log_likelihoods_base"]) == 4 for row in rows[:30])
    assert sum(row["right_tuned"] for row in rows[30:]) == report.abilities[1].rate(True).count == 30
    assert (
        "--ability notes.txt" in Path("page.html").read_text()
        and "ability_drop:extract" in Path("gate.xml").read_text()
    )
    files = [Path(name).read_bytes() for name in ("out/agl/drift.safetensors", "out/abilities.jsonl", "page.html")]

    worse = ("--fail-if", "nll_rise>0.02", "--fail-if", "ability_drop>0.05")
    code, out, err = command(monkeypatch, capsys, *arguments, *worse)
    assert code == 1 and "agl-trl: Failed: nll_rise:notes is" in err, err
    assert "Note: 'ability_drop:cities>0.05' can't pass on 30 rows, even if no answer changes: it takes 59." in out
    assert [Path(name).read_bytes() for name in ("out/agl/drift.safetensors", "out/abilities.jsonl")] == files[:2]
    code, out, err = command(
        monkeypatch, capsys, *arguments, "--ability-limit", 5, "--fail-if", "ability_drop:cities>0.1"
    )
    assert code == 3 and "agl-trl: Insufficient evidence: ability_drop:cities is" in err, err
    assert DriftReport.from_pretrained("out").abilities[0].metadata["rows_of_set"] == 30
    with safe_open("out/agl/drift.safetensors", "pt") as file:
        assert file.get_tensor("ability.cities.raw_tuned").shape == (5,)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--ability", "one.jsonl"), "Row 0 of 'one.jsonl' has one choice in the column 'choices'"),
        (("--ability", "empty.jsonl"), "Can't read rows from 'empty.jsonl': it holds no rows."),
        (("--ability", "nobody"), "There is no ability set 'nobody': name one of arc_challenge, arc_easy"),
        (("--suite", "abilities"), "Can't reach 'allenai/ai2_arc' on the Hub, and it isn't cached"),
        (
            ("--fail-if", "ability_drop>0.1"),
            "'ability_drop>0.1' needs a set with right answers: name one as `--ability`.",
        ),
        (
            ("--ability", "notes.txt", "--fail-if", "nll_rise:x>0.1"),
            "needs the set 'x': name it as `--ability`; there are notes.",
        ),
        (("--ability", "notes.txt", "--ability", "notes.txt"), "Two sets have the name 'notes'"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(options, sentence, sets, monkeypatch, capsys):
    monkeypatch.setattr("agl_trl.cli.drift.load_model", lambda name: pytest.fail("a model was loaded"))
    code, _, err = command(
        monkeypatch, capsys, "drift", "--base", "miniworld", "--adapter", ADAPTER, *options, "--output-dir", "out"
    )
    assert code == 2 and sentence in err and len(err.splitlines()) == 1 and not Path("out").exists(), err
