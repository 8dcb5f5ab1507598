"""Which rows are protected and which prompts should be refused: read strictly, in one way everywhere."""

import pytest
import torch
from datasets import Dataset, IterableDataset

from agl_trl.data.alignment import select_rows
from agl_trl.data.files import load_rows
from agl_trl.data.labels import is_protected, unsafe_column
from agl_trl.data.prompts import load_prompts


TRUE = [True, 1, 1.0, "true", "True", "TRUE", " yes ", "Yes", "1"]
FALSE = [False, 0, 0.0, "false", "False", "FALSE", "no", " No", "0"]


@pytest.mark.parametrize("value", [*TRUE, *FALSE], ids=repr)
def test_a_flag_is_read_by_what_it_says(value):
    assert is_protected(value, "Row 0") == (value in TRUE)


@pytest.mark.parametrize("value", [2, -1, 0.5, "maybe", "y", "refuse", "nan", [], [True], {}, float("inf")], ids=repr)
def test_anything_else_is_refused(value):
    with pytest.raises(ValueError, match=r"^Row 3: 'unsafe' holds .+, not true or false\.$"):
        is_protected(value, "Row 3")


@pytest.mark.parametrize("value", [None, "", float("nan")], ids=repr)
def test_a_gap_is_refused(value):
    with pytest.raises(ValueError, match=r"^Row 3: 'unsafe' is empty, not true or false\.$"):
        is_protected(value, "Row 3")


@pytest.mark.parametrize(
    "written", ["false\nTRUE\nno\nYes", "0\n1\n0\n1", "False\nTrue\nFalse\nTrue", "no \n yes\nno\nyes"]
)
@pytest.mark.parametrize("header", ["prompt,unsafe", "prompt , unsafe "])
def test_a_table_protects_and_asks_the_marked_rows(tmp_path, header, written):
    lines = [f"p{i},{flag}" for i, flag in enumerate(written.split("\n"))]
    (tmp_path / "rows.csv").write_text("\n".join([header, *lines]))
    name = str(tmp_path / "rows.csv")
    assert [(row.number, row["prompt"]) for row in select_rows(load_rows(name), None, 0)] == [(1, "p1"), (3, "p3")]
    prompts = load_prompts(name)
    assert prompts["unsafe"] == [False, True, False, True]
    assert unsafe_column(prompts).tolist() == [False, True, False, True]


def test_a_gap_among_numbers_is_told_by_its_row(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,unsafe\na,1\nb,0\nc,\n")  # pandas reads 1.0, 0.0 and NaN
    rows = load_rows(str(tmp_path / "rows.csv"))
    with pytest.raises(ValueError, match=r"^Row 2: 'unsafe' is empty, not true or false\.$"):
        select_rows(rows, None, 0)
    with pytest.raises(ValueError, match=r"^Row 2: 'unsafe' is empty"):
        unsafe_column(rows)
    assert [row["prompt"] for row in select_rows(rows.select(range(2)), None, 0)] == ["a"]


@pytest.mark.parametrize("kind", ["dataset", "list", "stream"])
def test_marked_rows_keep_their_numbers(kind):
    rows = [{"text": f"t{i}", " unsafe": "yes" if i % 3 == 1 else "no"} for i in range(9)]
    dataset = Dataset.from_list(rows)
    given = {"dataset": dataset, "list": rows, "stream": dataset.to_iterable_dataset()}[kind]
    chosen = select_rows(given, None, 0)
    assert [(row.number, row["text"], row["unsafe"]) for row in chosen] == [(i, f"t{i}", "yes") for i in (1, 4, 7)]
    assert [row.number for row in select_rows(chosen, None, 0)] == [1, 4, 7], "also selected once more"
    sampled = [row.number for row in select_rows(given, 2, 0)]
    expected = dataset.select([1, 4, 7]).shuffle(seed=0)["text"][:2]
    assert sampled == ([1, 4] if isinstance(given, IterableDataset) else [int(text[1:]) for text in expected])


def test_expected_answers_tell_as_well():
    prompts = Dataset.from_dict({"prompt": ["a", "b", "c"], "expected": ["refuse", "Comply", " refuse"]})
    assert torch.equal(unsafe_column(prompts), torch.tensor([True, False, True]))
    assert unsafe_column(prompts.remove_columns("expected")).all(), "all, where nothing is said"
    wrong = Dataset.from_dict({"prompt": ["a", "b"], "expected": ["refuse", "perhaps"]})
    with pytest.raises(ValueError, match=r"^Row 1: 'expected' holds 'perhaps', not refuse or comply\.$"):
        unsafe_column(wrong)
