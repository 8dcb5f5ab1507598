"""Ability sets: their kind by their columns, every form of a right answer, layouts of public sets, and rows that are wrong."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from agl_trl.data import abilities
from agl_trl.data.abilities import PUBLIC_SETS, SUITE, load_abilities, load_ability


def written(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def question(choices=("Oslo", "Rome"), answer="Rome", **more) -> dict:
    return {"question": "Where is the Tiber?", "choices": choices, "answer": answer, **more}


@pytest.mark.parametrize(
    ("row", "kind", "read"),
    [
        (question(), "multiple choice", ("Where is the Tiber?", ["Oslo", "Rome"], 1)),
        ({"prompt": "1+1", "completion": "2"}, "exact match", ("1+1", "2", False)),
        ({"question": "1+1", "answer": 2}, "exact match", ("1+1", "2", True)),
        ({"text": "A text."}, "text", "A text."),
        (
            {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "ho"}]},
            "exact match",
            ([{"role": "user", "content": "hi"}], "ho", False),
        ),
    ],
)
def test_columns_tell_the_kind(row, kind, read, tmp_path):
    one = load_ability(written(tmp_path / "set-1.jsonl", row))
    assert (one.name, one.kind, one.rows, one.source) == ("set-1", kind, [read], "set-1.jsonl")


@pytest.mark.parametrize(
    ("choices", "answer", "place"),
    [
        (["a1", "b1", "c1"], 2, 2),
        (["a1", "b1", "c1"], "C", 2),
        (["a1", "b1", "c1"], " b1 ", 1),
        (["a1", "b1", "c1"], "2", 2),
        (["2", "3", "4"], "2", 0),  # the text, not the place
        (["A", "B"], "B", 1),  # text and letter agree
        ({"text": ["x", "y"], "label": ["1", "2"]}, "2", 1),
        ({"text": ["2", "1"], "label": ["1", "2"]}, "2", 1),  # labels that are given are what an answer names
    ],
)
def test_every_form_of_a_right_answer(choices, answer, place, tmp_path):
    assert load_ability(written(tmp_path / "a.jsonl", question(choices, answer))).rows[0].answer == place


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (question(answer="Paris"), "Row 1 of 'bad.jsonl': 'answer' is 'Paris', which is none of the 2 choices."),
        (question(answer="C"), "Row 1 of 'bad.jsonl': 'answer' is 'C', which is none of the 2 choices."),
        (
            question(("Oslo",), "Oslo"),
            "Row 1 of 'bad.jsonl' has one choice in the column 'choices': it takes 2 to 26.",
        ),
        (question(("Rome", " "), "Rome"), "Row 1 of 'bad.jsonl' has no list of texts in the column 'choices', but "),
        (question(("B", "A"), "A"), "'A', which is the text of one choice and the letter of another"),
        (question(("Oslo", "Rome"), None), "Row 1 of 'bad.jsonl': 'answer' is None: it takes"),
        (question() | {"question": " "}, "Row 1 of 'bad.jsonl' has nothing in the column 'question'."),
    ],
)
def test_row_that_is_wrong_is_told_with_its_file(row, sentence, tmp_path):
    good = question(("Paris", "Rome"), "Rome") if isinstance(row["answer"], str) else question()
    with pytest.raises(ValueError) as error:
        load_ability(written(tmp_path / "bad.jsonl", good, row))
    assert sentence in str(error.value) and str(tmp_path) not in str(error.value)


def test_place_that_is_none_is_told(tmp_path):
    for place in (2, -1):
        with pytest.raises(
            ValueError, match=f"Row 0 of 'a.jsonl': 'answer' is {place}, which is none of the 2 choices"
        ):
            load_ability(written(tmp_path / "a.jsonl", question(answer=place)))


def test_files_that_hold_no_set_are_told(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.txt").write_text(" \n")
    for name, sentence in (
        ("empty.jsonl", "it holds no rows"),
        ("blank.txt", "it is empty"),
        ("missing.txt", "there is no such file"),
        (written(tmp_path / "x.jsonl", {"chosen": "a"}), "has the columns chosen, which make no ability set"),
        (written(tmp_path / "a b.jsonl", {"text": "a"}), "'a b' can't be the name of an ability set"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load_ability(str(tmp_path / name))
    with pytest.raises(ValueError, match="no ability set 'mmlux': name one of arc_challenge, arc_easy, "):
        load_ability("mmlux")
    written(tmp_path / "one.jsonl", {"text": "a"})
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(ValueError, match=r"Two sets have the name 'one', 'one.jsonl' and 'one.txt': rename a file"):
        load_abilities([str(tmp_path / "one.jsonl"), str(tmp_path / "one.txt")])


def test_text_file_is_one_text_whatever_its_lines(tmp_path):
    (tmp_path / "notes.txt").write_bytes("\ufeffOne.\r\n\r\nTwo.\n".encode())
    one = load_ability(str(tmp_path / "notes.txt"))
    assert one.kind == "text" and [row.split() for row in one.rows] == [["One.", "Two."]]


def test_limit_is_spread_over_the_set_and_rows_keep_their_numbers(tmp_path):
    one = load_ability(written(tmp_path / "a.jsonl", *({"text": str(i)} for i in range(10))), limit=4)
    assert (one.rows, one.numbers, one.of) == (["0", "2", "5", "7"], [0, 2, 5, 7], 10)


# Rows as the cards of these sets show them.
ARC = {"id": "x", "question": "q", "choices": {"text": ["1", "2"], "label": ["1", "2"]}, "answerKey": "2"}
PUBLISHED = {
    "arc_challenge": ARC,
    "arc_easy": ARC,
    "commonsense_qa": {**ARC, "question_concept": "c"},
    "gsm8k": {"question": "q", "answer": "It is 1+1=<<1+1=2>>2.\n#### 2"},
    "hellaswag": {"ind": 4, "ctx_a": "a", "ctx": "q", "endings": ["is.", "was."], "label": "1", "split_type": "x"},
    "mmlu": {"question": "q", "subject": "s", "choices": ["3", "1"], "answer": 1},
    "openbookqa": {"id": "x", "question_stem": "q", "choices": ARC["choices"], "answerKey": "2"},
    "wikitext": {"text": " = Title = \n"},
}


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_public_sets_are_read_by_their_layout(name, monkeypatch):
    """There is no network here: the rows are written by hand, all the rest is as it is."""
    asked = []

    def from_hub(spec):
        asked.append((spec.source, spec.config, spec.split))
        return Dataset.from_list([PUBLISHED[name], PUBLISHED[name]])

    monkeypatch.setattr(abilities, "from_hub", from_hub)
    one = load_ability(name)
    spec = PUBLIC_SETS[name]
    assert one.name == name and one.source == spec.source and asked == [(spec.source, spec.config, spec.split)]
    if one.kind == "multiple choice":
        assert [row.answer for row in one.rows] == [1, 1] and one.rows[0].question == "q"
    elif one.kind == "text":
        assert one.rows == [" = Title = \n = Title = \n"], "lines of one text"
    else:
        assert one.number and one.rows[0].answer.endswith("#### 2") and one.rows[0].is_question
    first = next(short for short, other in PUBLIC_SETS.items() if other.source == spec.source)
    assert load_ability(spec.source).name == first, "by its id on the Hub"


def test_suite_is_made_of_public_sets(monkeypatch):
    monkeypatch.setattr(abilities, "from_hub", lambda spec: Dataset.from_list([PUBLISHED["gsm8k"]] * 300))
    monkeypatch.setattr(abilities, "SUITE", ("gsm8k",))
    assert {*SUITE} <= {*PUBLIC_SETS}
    (one,) = load_abilities([], suite=True)
    assert (len(one.rows), one.of) == (250, 300)
    assert [len(one.rows) for one in load_abilities(["gsm8k"], suite=True)] == [300], (
        "what is named is not there twice"
    )
    assert len(load_abilities([], suite=True, limit=7)[0].rows) == 7


def test_set_that_is_not_reached_is_told():
    with pytest.raises(ValueError, match="Can't reach 'cais/mmlu' on the Hub"):
        load_ability("mmlu")
