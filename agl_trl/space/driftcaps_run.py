"""A prompt set through every side: refusals by category with intervals, every verdict, files to take along."""

import base64
import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from datasets import Dataset

from ..data.prompts import load_prompts, spread
from ..evaluation.rates import Rate
from .models import Models, Side
from .questions import LONGEST_ANSWER, SETS, checked_number


MOST_PROMPTS = 240
BATCH = 16
# Rows to show, by what they should be and which sides refused.
FILTERS: dict[str, Callable[[str, list[bool]], bool]] = {
    "All": lambda expected, refused: True,
    "Models differ": lambda expected, refused: len({*refused}) > 1,
    "Unsafe, not refused": lambda expected, refused: expected == "refuse" and not all(refused),
    "Harmless, refused": lambda expected, refused: expected == "comply" and any(refused),
}


@cache
def prompt_set(name: str) -> Dataset:
    """
    Prompts to ask, with every look-alike and everyday category under one name.

    Args:
        name (`str`): One of [`SETS`].

    Raises:
        `ValueError`: If there is no such set.
    """
    if name not in SETS:
        raise ValueError(f"There is no prompt set '{name[:40]}': choose {' or '.join(SETS)}.")
    rows = load_prompts(SETS[name])
    # Their subtypes have a handful of prompts each: intervals of everything.
    families = [
        category if unsafe else _family(category)
        for category, unsafe in zip(rows["category"], rows["unsafe"], strict=True)
    ]
    return rows.remove_columns("category").add_column("category", families)


def _family(category: str) -> str:
    return "everyday" if category.startswith("everyday") else "look-alikes"


@cache
def categories(name: str) -> tuple[str, ...]:
    """Categories of a prompt set, the unsafe ones first."""
    rows = prompt_set(name)
    unsafe = {c for c, u in zip(rows["category"], rows["unsafe"], strict=True) if u}
    return (*sorted(unsafe), *sorted({*rows["category"]} - unsafe))


class SideRate(NamedTuple):
    """Refusal rate of a side with the bounds of its Wilson 95 % interval."""

    side: Side
    rate: Rate
    low: float
    high: float


class Group(NamedTuple):
    """Refusal rates on the prompts that should be refused, or on those that should be answered."""

    expected: str
    categories: dict[str, list[SideRate]]
    overall: list[SideRate]


@dataclass
class Result:
    """
    What is known so far of a run.

    Args:
        sides (`list[Side]`): Who is asked.
        total (`int`): Number of prompts.
        rows (`list[dict[str, Any]]`): One per prompt that every side has answered.
    """

    sides: list[Side]
    total: int
    rows: list[dict[str, Any]] = field(default_factory=list)

    def groups(self) -> list[Group]:
        """Unsafe prompts, then harmless ones, as far as there are any; categories by name."""
        found = []
        for expected in ("refuse", "comply"):
            rows = [row for row in self.rows if row["expected"] == expected]
            names = sorted({row["category"] for row in rows})
            by_category = {name: self._rates([row for row in rows if row["category"] == name]) for name in names}
            if rows:
                found.append(Group(expected, by_category, self._rates(rows)))
        return found

    def _rates(self, rows: list[dict[str, Any]]) -> list[SideRate]:
        counts = {side: sum(row[f"label_{side.key}"] == "refusal" for row in rows) for side in self.sides}
        rates = {side: Rate(count, len(rows)) for side, count in counts.items()}
        return [SideRate(side, rate, *rate.interval) for side, rate in rates.items()]


def run(
    models: Models, name: str, chosen: list[str], number: float, length: float, base: str, adapter: str
) -> Iterator[Result]:
    """
    The result after every batch; all decoding is greedy.

    Args:
        models ([`Models`]): What the app has loaded.
        name (`str`): One of [`SETS`].
        chosen (`list[str]`): Categories to ask; none: all.
        number (`float`): Number of prompts, spread over the categories.
        length (`float`): Longest answer in tokens.
        base, adapter (`str`): Names of the models; empty: the app's own.

    Raises:
        `ValueError`: If the request can't be answered.
    """
    rows, known = prompt_set(name), categories(name)
    if unknown := [category for category in chosen or () if category not in known]:
        raise ValueError(f"There is no category '{str(unknown[0])[:40]}' in {name}: choose among {', '.join(known)}.")
    limit = int(checked_number("number of prompts", number, 1, MOST_PROMPTS))
    longest = int(checked_number("length", length, 1, LONGEST_ANSWER))
    model = models.get(base, adapter)
    if chosen:
        rows = rows.select([i for i, category in enumerate(rows["category"]) if category in chosen])
    rows = spread(rows, limit)
    result = Result(model.sides, len(rows))
    yield result
    for batch in rows.iter(BATCH):
        questions = [prompt[-1]["content"] for prompt in batch["prompt"]]
        found: list[dict[str, Any]] = [
            {"id": id_, "category": category, "expected": "refuse" if unsafe else "comply", "prompt": question}
            for id_, category, unsafe, question in zip(
                batch["id"], batch["category"], batch["unsafe"], questions, strict=True
            )
        ]
        for side in model.sides:
            texts = model.answer_all(side, batch["prompt"], longest)
            for row, prompt, text in zip(found, batch["prompt"], texts, strict=True):
                verdict = model.verdict(prompt, text)
                row[f"label_{side.key}"], row[f"reason_{side.key}"] = verdict.label, verdict.reason
                row[f"answer_{side.key}"] = text
        result.rows += found
        yield result


def summary(result: Result) -> dict[str, Any]:
    """A run for programs: every row, and rates with Wilson 95 % intervals."""

    def told(rates: list[SideRate]) -> dict[str, Any]:
        return {
            side.title: {
                "refused": rate.count,
                "of": rate.total,
                "interval": [round(float(low), 4), round(float(high), 4)],
            }
            for side, rate, low, high in rates
        }

    groups = result.groups()
    overall = {group.expected: told(group.overall) for group in groups}
    return {
        "categories": {name: told(rates) for group in groups for name, rates in group.categories.items()},
        "unsafe": overall.get("refuse"),
        "harmless": overall.get("comply"),
        "rows": result.rows,
    }


def select_rows(result: Result, shown: str, words: str) -> list[dict[str, Any]]:
    """
    Rows that pass the filters.

    Args:
        result ([`Result`]): The run.
        shown (`str`): One of [`FILTERS`].
        words (`str`): Text that must be in a prompt, category, verdict or answer.
    """
    words = words.strip().lower()[:200]
    found = []
    for row in result.rows:
        refused = [row[f"label_{side.key}"] == "refusal" for side in result.sides]
        text = " ".join(str(value) for key, value in row.items() if not key.startswith("reason"))
        if words in text.lower().replace("_", " ") and FILTERS[shown](row["expected"], refused):
            found.append(row)
    return found


class Download(NamedTuple):
    """A file that travels inside its own address."""

    kind: str
    address: str


def downloads(result: Result) -> list[Download]:
    """A run as files."""
    files = (("CSV", "text/csv", as_csv(result)), ("JSONL", "application/jsonl", as_jsonl(result)))
    return [
        Download(kind, f"data:{mime};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}")
        for kind, mime, text in files
    ]


def as_csv(result: Result) -> str:
    """The rows for a spreadsheet."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(result.rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in result.rows:  # a spreadsheet would run a cell that begins like a formula
        writer.writerow(
            {key: f"'{value}" if value.startswith(("=", "+", "-", "@", "\t")) else value for key, value in row.items()}
        )
    return file.getvalue()


def as_jsonl(result: Result) -> str:
    """The rows for programs."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows)
