"""Sets that tell what a model can do: questions with choices, questions with one answer, texts; public ones by name, and files."""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from datasets import Dataset

from ..artifacts.schema import short_repr
from .files import is_file, load_rows, read_text
from .labels import is_missing
from .prompts import PromptSet, from_hub
from .rows import ANSWERS, Conversation, Row, RowError, check_content, prompt_text


AbilityKind: TypeAlias = Literal["multiple choice", "exact match", "text"]
NAME = re.compile(r"[\w.-]{1,60}")  # of a set, as a rule writes it
LAYOUTS = (
    "'question', 'choices', 'answer' (multiple choice), 'prompt' or 'question' with 'answer' or 'completion' (exact match), or 'text' "
    "(likelihood)"
)
SUITE_ROWS = 250  # of every set of the suite


class PublicSet(NamedTuple):
    """
    Where a public set is, and what its columns mean.

    With `choices` it is multiple choice, else with `answer` exact match, else text. `choices` holds texts, or a mapping with `text`
    and `label`. With `lettered` the question shows its choices, and their letters are chosen among. With `number` the last number of
    an answer is compared. With `joined` the rows are lines of one text.
    """

    source: str
    license: str
    question: str
    choices: str | None = None
    answer: str | None = None
    config: str | None = None
    split: str = "test"
    lettered: bool = False
    number: bool = False
    joined: bool = False


# fmt: off
PUBLIC_SETS = {
    "arc_challenge": PublicSet("allenai/ai2_arc", "cc-by-sa-4.0", "question", "choices", "answerKey", config="ARC-Challenge"),
    "arc_easy": PublicSet("allenai/ai2_arc", "cc-by-sa-4.0", "question", "choices", "answerKey", config="ARC-Easy"),
    "commonsense_qa": PublicSet("tau/commonsense_qa", "mit", "question", "choices", "answerKey", split="validation"),
    "gsm8k": PublicSet("openai/gsm8k", "mit", "question", answer="answer", config="main", number=True),
    "hellaswag": PublicSet("Rowan/hellaswag", "mit", "ctx", "endings", "label", split="validation"),
    "mmlu": PublicSet("cais/mmlu", "mit", "question", "choices", "answer", config="all", lettered=True),
    "openbookqa": PublicSet("allenai/openbookqa", "", "question_stem", "choices", "answerKey", config="main"),
    "wikitext": PublicSet("Salesforce/wikitext", "cc-by-sa-3.0", "text", config="wikitext-2-raw-v1", joined=True),
}
# fmt: on
SUITE = ("arc_challenge", "gsm8k", "hellaswag", "mmlu", "wikitext")


class MultipleChoice(NamedTuple):
    """A question, its choices, and which of them is right."""

    question: str
    choices: list[str]
    answer: int


class ExactMatch(NamedTuple):
    """What is asked, the one right answer, and whether it is a question and no prompt as the model is to read it."""

    prompt: Conversation | str
    answer: str
    is_question: bool = False


@dataclass(frozen=True)
class AbilitySet:
    """
    A set, read and checked.

    Args:
        name (`str`):
            Its name in reports and rules.
        kind (`str`):
            `"multiple choice"`, `"exact match"` or `"text"`.
        rows (`list[MultipleChoice]`, `list[ExactMatch]` or `list[str]`):
            Its rows.
        numbers (`list[int]`):
            Their numbers in the source.
        source (`str`):
            File, or id on the Hub.
        of (`int`):
            Rows of the source, of which these are spread evenly over it.
        license (`str`, *optional*, defaults to `""`):
            Its licence; empty where it is not known.
        lettered (`bool`, *optional*, defaults to `False`):
            Whether the letters of the choices are chosen among, and the question shows the choices.
        number (`bool`, *optional*, defaults to `False`):
            Whether the last number of an answer is compared, and not all of it.
    """

    name: str
    kind: AbilityKind
    rows: list[Any]
    numbers: list[int]
    source: str
    of: int
    license: str = ""
    lettered: bool = False
    number: bool = False


def load_abilities(names: Sequence[str], suite: bool = False, limit: int | None = None) -> list[AbilitySet]:
    """
    Several sets, as [`load_ability`] reads each.

    Args:
        names (`Sequence[str]`):
            Their names.
        suite (`bool`, *optional*, defaults to `False`):
            Whether to measure [`SUITE`], too.
        limit (`int`, *optional*):
            Most rows of every set; by default all, and of the suite's [`SUITE_ROWS`].

    Raises:
        `ValueError`: If one can't be read, or two have one name.
    """
    loaded = [load_ability(name, limit or SUITE_ROWS) for name in SUITE if suite and name not in names]
    loaded += [load_ability(name, limit) for name in names]
    for place, one in enumerate(loaded):
        other = next((other for other in loaded[:place] if other.name == one.name), None)
        if other is not None:
            raise ValueError(
                f"Two sets have the name '{one.name}', '{other.source}' and '{one.source}': rename a file."
            )
    return loaded


def load_ability(name: str, limit: int | None = None) -> AbilitySet:
    """
    A set of one of three kinds, which its columns tell.

    Args:
        name (`str`):
            One of [`PUBLIC_SETS`] by its name or its id on the Hub, a file as [`load_rows`] takes it (a `.txt` file is one text), or
            another dataset on the Hub (split `test`, else `train`).
        limit (`int`, *optional*):
            Most rows, spread evenly over the set.

    Raises:
        `ValueError`: If it can't be reached or read, has no row, or its columns are of no kind; of a row, its file and number.
    """
    known = PUBLIC_SETS.get(name) or next((spec for spec in PUBLIC_SETS.values() if spec.source == name), None)
    if known is not None:
        short = next(short for short, spec in PUBLIC_SETS.items() if spec is known)
        return _read(
            short, from_hub(PromptSet(known.source, "", "", config=known.config, split=known.split)), known, limit
        )
    if name.lower().endswith(".txt"):
        rows, source = Dataset.from_dict({"text": [read_text(name)]}), Path(name).name
    elif is_file(name):
        rows, source = load_rows(name), Path(name).name
    elif "/" not in name:
        raise ValueError(
            f"There is no ability set '{name}': name one of {', '.join(PUBLIC_SETS)}, a file, or a dataset on the Hub."
        )
    else:
        rows, source = from_hub(PromptSet(name, "", "", split="")), name
    short = Path(name).stem if is_file(name) else name.split("/")[-1]
    if not NAME.fullmatch(short):
        raise ValueError(
            f"'{short}' can't be the name of an ability set: rename the file with letters, digits, '-', '_' and '.'."
        )
    return _read(short, rows, _layout(source, rows.column_names, rows.info.license or ""), limit)


def _layout(source: str, columns: list[str], licence: str) -> PublicSet:
    question = next((column for column in ("question", "prompt") if column in columns), None)
    answer = next((column for column in (*ANSWERS, "answerKey") if column in columns), None)
    if question is not None and answer is not None:
        choices = "choices" if "choices" in columns else None
        return PublicSet(source, licence, question, choices, answer)
    if "text" in columns:
        return PublicSet(source, licence, "text")
    raise ValueError(
        f"'{source}' has the columns {', '.join(columns)}, which make no ability set: it takes {LAYOUTS}."
    )


def _read(name: str, rows: Dataset, layout: PublicSet, limit: int | None) -> AbilitySet:
    for column in (layout.question, layout.choices, layout.answer):
        if column is not None and column not in rows.column_names:
            raise ValueError(f"'{layout.source}' has no column '{column}'; found {', '.join(rows.column_names)}.")
    kind: AbilityKind = "multiple choice" if layout.choices else "exact match" if layout.answer else "text"
    if layout.joined:
        rows = Dataset.from_dict({layout.question: ["".join(rows[layout.question])]})
    count = len(rows)
    numbers = [*range(count)] if limit is None or limit >= count else [i * count // limit for i in range(limit)]
    read = {"multiple choice": _multiple_choice, "exact match": _exact_match, "text": _text}[kind]
    told = f"of '{layout.source}'"
    found = [
        read(Row(row, number), layout, f"Row {number} {told}")
        for number, row in zip(numbers, rows.select(numbers), strict=True)
    ]
    if not found:
        raise ValueError(f"'{layout.source}' holds no rows.")
    return AbilitySet(name, kind, found, numbers, layout.source, count, layout.license, layout.lettered, layout.number)


def _cell(row: Row, column: str, name: str) -> str:
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or is_missing(value):
        raise RowError(f"{name} has no text in the column '{column}', but {short_repr(value)}.")
    if not str(value).strip():
        raise RowError(f"{name} has nothing in the column '{column}'.")
    return str(value)


def _text(row: Row, layout: PublicSet, name: str) -> str:
    return _cell(row, layout.question, name)


def _exact_match(row: Row, layout: PublicSet, name: str) -> ExactMatch:
    assert layout.answer is not None
    prompt, answer = row[layout.question], row[layout.answer]
    for column, value in ((layout.question, prompt), (layout.answer, answer)):
        if isinstance(value, list):
            check_content(value, name, column)
    if not isinstance(prompt, list):
        prompt = _cell(row, layout.question, name)
    answer = prompt_text(answer) if isinstance(answer, list) else _cell(row, layout.answer, name)
    if not answer.strip():
        raise RowError(f"{name} has nothing in the column '{layout.answer}'.")
    return ExactMatch(prompt, answer, layout.question != "prompt")


def _multiple_choice(row: Row, layout: PublicSet, name: str) -> MultipleChoice:
    assert layout.choices is not None and layout.answer is not None
    value, labels, named = row[layout.choices], list(string.ascii_uppercase), False
    if isinstance(value, dict) and value.get("label"):
        labels, value, named = [str(label) for label in value["label"]], value.get("text"), True
    if not isinstance(value, list) or not all(isinstance(c, str | int | float) and str(c).strip() for c in value):
        raise RowError(f"{name} has no list of texts in the column '{layout.choices}', but {short_repr(value)}.")
    choices = [str(choice).strip() for choice in value]
    if not 2 <= len(choices) <= len(labels):
        many = "one choice" if len(choices) == 1 else f"{len(choices)} choices"
        raise RowError(f"{name} has {many} in the column '{layout.choices}': it takes 2 to {len(labels)}.")
    answer, cell = row[layout.answer], f"{name}: '{layout.answer}'"
    if not named:
        place = _right(answer, choices, labels, cell)
    elif str(answer).strip() in labels[: len(choices)]:
        place = labels.index(str(answer).strip())
    else:
        raise RowError(f"{cell} is {short_repr(answer)}, which is none of the labels {', '.join(labels)}.")
    return MultipleChoice(_cell(row, layout.question, name).strip(), choices, place)


def _right(answer: Any, choices: list[str], labels: list[str], cell: str) -> int:
    """Which choice an answer names: by its text, its letter, or its place, counted from 0."""
    if isinstance(answer, str):
        text = answer.strip()
        places = {choices.index(text)} if text in choices else set()
        if text in labels[: len(choices)]:
            places.add(labels.index(text))
        if not places and text.isdecimal() and int(text) < len(choices):
            places.add(int(text))
    elif isinstance(answer, int) and not isinstance(answer, bool):
        places = {answer} if 0 <= answer < len(choices) else set()
    else:
        raise RowError(
            f"{cell} is {short_repr(answer)}: it takes the text of a choice, its letter, or its place from 0."
        )
    if not places:
        raise RowError(f"{cell} is {short_repr(answer)}, which is none of the {len(choices)} choices.")
    if len(places) > 1:
        raise RowError(
            f"{cell} is {short_repr(answer)}, which is the text of one choice and the letter of another: write its place from 0."
        )
    return places.pop()
