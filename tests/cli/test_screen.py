"""`agl-trl screen`: a ranking, a table of scores and what is left of the rows; and what can't be done."""

import json

import pytest

from agl_trl.data.alignment import select_rows
from agl_trl.fisher.protected_rows import COMPLY, REFUSE, reference_answers
from agl_trl.miniworld import alignment_dataset, load_model, load_tokenizer, task_dataset
from tests.helpers.commands import command
from tests.helpers.models import chat_rows


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> tuple[str, list[dict], set[int]]:
    """A file of 36 harmless rows and 4 hostile ones, its rows, and which these are."""
    clean, dirty = task_dataset("steps"), task_dataset("steps", hostile=0.05)
    hostile = [i for i, (a, b) in enumerate(zip(clean, dirty, strict=True)) if a != b][:4]
    rows = [clean[i] for i in range(36)]
    for place, i in zip((3, 9, 20, 31), hostile, strict=True):
        rows.insert(place, dirty[i])
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path), rows, {3, 9, 20, 31}


def test_rows_are_ranked_and_the_first_left_out(mixed, tmp_path, monkeypatch, capsys):
    path, rows, hostile = mixed
    scores, output = tmp_path / "scores.jsonl", tmp_path / "new" / "left.jsonl"
    arguments = ("screen", "--model", "miniworld", "--dataset", path, "--protected", "miniworld", "--batch-size", 16)
    code, out, err = command(monkeypatch, capsys, *arguments, "--scores", scores, "--output", output, "--drop", 0.1)
    assert code == 0, err
    assert "40 rows; 4 ask for what is to be refused" in out and "36 rows without the 4 ranked first" in out
    table = [json.loads(line) for line in scores.read_text().splitlines()]
    assert [line["row"] for line in table] == [*range(40)]
    assert {line["row"] for line in table if line["score"] > 0} == hostile
    assert all(line["score"] == pytest.approx(min(line["request"], -line["answer"])) for line in table)
    left = [json.loads(line) for line in output.read_text().splitlines()]
    assert left == [row for i, row in enumerate(rows) if i not in hostile]
    assert "bread" not in out and not any(row["prompt"][0]["content"] in out for row in rows), "numbers alone are told"


def test_conversations_are_screened_as_prompt_and_answer(mixed, tmp_path, monkeypatch, capsys):
    """Training rows and protected rows as `messages`; a row of text alone is counted in a note."""
    path, rows, hostile = mixed
    files = {
        "rows": [{"messages": row["prompt"] + row["completion"]} for row in rows],
        "protected": [
            {"messages": row["prompt"] + row["completion"], "unsafe": row["unsafe"]} for row in alignment_dataset()
        ],
        "pairs": [{name: row[name] for name in ("prompt", "completion", "unsafe")} for row in alignment_dataset()],
        "texts": [{"text": "Bread is baked."}] * 3,
    }
    for name, found in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    tables = []
    for dataset, protected in ((path, "pairs"), (tmp_path / "rows.jsonl", "protected")):
        arguments = ("--dataset", dataset, "--protected", tmp_path / f"{protected}.jsonl", "--batch-size", 16)
        scores = tmp_path / "scores.jsonl"
        code, out, err = command(monkeypatch, capsys, "screen", "--model", "miniworld", *arguments, "--scores", scores)
        assert code == 0 and "Note" not in out, err
        tables.append(scores.read_text())
    assert tables[0] == tables[1]
    assert {line["row"] for line in map(json.loads, tables[1].splitlines()) if line["score"] > 0} == hostile
    arguments = ("--dataset", tmp_path / "texts.jsonl", "--protected", tmp_path / "pairs.jsonl", "--batch-size", 16)
    code, out, err = command(monkeypatch, capsys, "screen", "--model", "miniworld", *arguments)
    assert code == 0 and "Note: 3 rows are text alone, without a request, so that their scores say little" in out, err


def test_reference_answers_of_statistics_stand_for_rows(mixed, tmp_path, monkeypatch, capsys):
    path, _, hostile = mixed
    model, tokenizer = load_model(), load_tokenizer()
    kinds = {k: select_rows(alignment_dataset(), 32, 0, unsafe=k == REFUSE) for k in (REFUSE, COMPLY)}
    references = reference_answers(model, tokenizer, kinds, max_length=None, progress=False)
    references.save_pretrained(tmp_path)
    arguments = ("screen", "--model", "miniworld", "--dataset", path, "--fisher", tmp_path)
    code, _, err = command(monkeypatch, capsys, *arguments, "--scores", tmp_path / "scores.jsonl")
    assert code == 0, err
    table = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert {line["row"] for line in sorted(table, key=lambda line: -line["score"])[:4]} == hostile
    references.metadata["base_model"]["config"]["num_hidden_layers"] = 7
    references.save_pretrained(tmp_path)
    code, _, err = command(monkeypatch, capsys, *arguments)
    assert code == 2 and "reference answers" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--drop", "3"), "`--output` gets the rows that `--drop` leaves: give both"),
        (("--output", "left.jsonl"), "`--output` gets the rows that `--drop` leaves: give both"),
        (("--output", "left.jsonl", "--drop", "2.5"), "a share below 1 or a whole number of rows, got 2.5"),
        (("--output", "left.jsonl", "--drop", "0"), "a share below 1 or a whole number of rows, got 0"),
        (("--output", "left.jsonl", "--drop", "2"), "`--drop 2` leaves none of the 2 rows of"),
        (("--protected", "miniworld", "--fisher", "x"), "both say which rows are protected: give one"),
        (("--protected", "refusals.jsonl"), "'refusals.jsonl' marks no row to answer"),
        (("--protected", "miniworld"), "Can't screen 'rows.jsonl': Row 1 has nothing in the column 'completion'"),
        (("--fisher", "nowhere"), "nowhere"),
    ],
)
def test_what_can_not_be_done_is_told_and_nothing_written(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = chat_rows(1, "say", "{}")[0]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (first, {"prompt": first["prompt"]}))
    )
    (tmp_path / "refusals.jsonl").write_text(json.dumps(first) + "\n")
    code, _, err = command(monkeypatch, capsys, "screen", "--model", "miniworld", "--dataset", "rows.jsonl", *options)
    assert code == 2 and said in err
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "refusals.jsonl"}
