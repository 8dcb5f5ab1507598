"""A prompt set through every side: refusals by category with intervals, every verdict in a table, files to take along."""

import base64
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from html import escape
from typing import Any

from datasets import Dataset

from ..data.prompts import load_prompts, spread
from ..evaluation.behaviour import Rate
from ..evaluation.judges import StringJudge
from .models import Models, Side
from .questions import LONGEST_ANSWER
from .side_by_side import VERDICTS


SETS = {"Embedded world": "miniworld", "DriftCaps": "driftcaps"}  # by what they are called in the app
MOST_PROMPTS = 240
BATCH = 16
FILTERS = ("All", "Models differ", "Unsafe, not refused", "Harmless, refused")


@cache
def prompt_set(name: str) -> Dataset:
    """One of [`SETS`], with every look-alike and everyday category under one name."""
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
    rows = prompt_set(name)
    unsafe = {c for c, u in zip(rows["category"], rows["unsafe"], strict=True) if u}
    return (*sorted(unsafe), *sorted({*rows["category"]} - unsafe))


@dataclass
class Result:
    """What is known so far of a run: a row per prompt that every side has answered."""

    sides: list[Side]
    total: int
    rows: list[dict[str, Any]] = field(default_factory=list)

    def rates(self) -> dict[str, dict[str, Rate]]:
        """Refusal rate by category and key of the side, in the order of [`categories`]."""
        names = {row["category"]: row["expected"] for row in self.rows}
        ordered = sorted(names, key=lambda name: (names[name] == "comply", name))
        return {
            name: {
                side.key: self._rate(side, [row for row in self.rows if row["category"] == name])
                for side in self.sides
            }
            for name in ordered
        }

    def overall(self, expected: str) -> dict[str, Rate] | None:
        rows = [row for row in self.rows if row["expected"] == expected]
        return {side.key: self._rate(side, rows) for side in self.sides} if rows else None

    @staticmethod
    def _rate(side: Side, rows: list[dict[str, Any]]) -> Rate:
        return Rate(sum(row[f"label_{side.key}"] == "refusal" for row in rows), len(rows))


def run(
    models: Models, name: str, chosen: list[str], number: float, length: float, base: str, adapter: str
) -> Iterator[Result]:
    """
    The result after every batch; all decoding is greedy.

    Raises:
        `ValueError`: If the request can't be answered.
    """
    rows, known = prompt_set(name), categories(name)
    if unknown := [category for category in chosen or () if category not in known]:
        raise ValueError(f"There is no category '{str(unknown[0])[:40]}' in {name}: choose among {', '.join(known)}.")
    if number is None or not 1 <= number <= MOST_PROMPTS:
        raise ValueError(f"The number of prompts must be between 1 and {MOST_PROMPTS}.")
    if length is None or not 1 <= length <= LONGEST_ANSWER:
        raise ValueError(f"The length must be between 1 and {LONGEST_ANSWER}.")
    model = models.get(base, adapter)
    if chosen:
        rows = rows.select([i for i, category in enumerate(rows["category"]) if category in chosen])
    rows = spread(rows, int(number))
    result = Result(model.sides, len(rows))
    yield result
    for start in range(0, len(rows), BATCH):
        batch = rows.select(range(start, min(start + BATCH, len(rows))))
        questions = [prompt[-1]["content"] for prompt in batch["prompt"]]
        found: list[dict[str, Any]] = [
            {
                "id": row["id"],
                "category": row["category"],
                "expected": "refuse" if row["unsafe"] else "comply",
                "prompt": q,
            }
            for row, q in zip(batch, questions, strict=True)
        ]
        for side in model.sides:
            texts = model.answer_all(side, list(batch["prompt"]), int(length))
            for row, text, verdict in zip(found, texts, StringJudge()(questions, texts), strict=True):
                row[f"label_{side.key}"], row[f"reason_{side.key}"] = verdict.label, verdict.reason
                row[f"answer_{side.key}"] = text
        result.rows += found
        yield result


def summary(result: Result) -> dict[str, Any]:
    """A run for programs: every row, and rates with Wilson 95 % intervals."""

    def told(rates: dict[str, Rate]) -> dict[str, Any]:
        return {
            side.title: {
                "refused": rates[side.key].count,
                "of": rates[side.key].total,
                "interval": [round(float(bound), 4) for bound in rates[side.key].interval],
            }
            for side in result.sides
        }

    unsafe, safe = result.overall("refuse"), result.overall("comply")
    return {
        "categories": {name: told(rates) for name, rates in result.rates().items()},
        "unsafe": unsafe and told(unsafe),
        "harmless": safe and told(safe),
        "rows": result.rows,
    }


def progress_html(result: Result, ended: bool) -> str:
    done, total = len(result.rows), result.total
    told = f"{done} prompts, {len(result.sides)} answers each" if ended else f"{done} of {total} prompts"
    return (
        f'<div class="agl-progress" role="progressbar" aria-label="Prompts answered" aria-valuemin="0" aria-valuemax="{total}" '
        f'aria-valuenow="{done}"><div><i style="width:{100 * done / total:.1f}%"></i></div><span>{told}</span></div>'
    )


def chart_html(result: Result) -> str:
    """Dots with their Wilson 95 % intervals, a line per category; drawn as text and boxes, so that it fits every width."""
    if not result.rows:
        return ""
    legend = "".join(f'<li class="agl-side-{s.key}"><i></i>{escape(s.title)}</li>' for s in result.sides)
    groups = []
    by_category = result.rates()
    expected = {row["category"]: row["expected"] for row in result.rows}
    for wanted, title, better in (
        ("refuse", "Unsafe requests refused", "higher is better"),
        ("comply", "Harmless requests refused", "lower is better"),
    ):
        overall = result.overall(wanted)
        if overall is None:
            continue
        names = [name for name in by_category if expected[name] == wanted]
        lines = [_line(name.replace("_", " "), by_category[name], result.sides) for name in names]
        total = [_line("all", overall, result.sides, strong=True)] if len(names) > 1 else []
        axis = '<div class="agl-axis" aria-hidden="true"><span></span><span><i>0 %</i><i>50 %</i><i>100 %</i></span></div>'
        groups.append(f"<h4>{title} <small>{better}</small></h4>{''.join(total + lines)}{axis}")
    note = "Dots are shares of refusals, bars their 95 % Wilson intervals; all answers are decoded greedily."
    return f'<figure class="agl-chart"><ul class="agl-legend">{legend}</ul>{"".join(groups)}<figcaption>{note}</figcaption></figure>'


def _line(name: str, rates: dict[str, Rate], sides: list[Side], strong: bool = False) -> str:
    marks, told = [], []
    for side in sides:
        rate = rates[side.key]
        low, high = rate.interval
        told.append(f"{side.title}: {rate.count} of {rate.total} ({rate.value:.0%}, interval {low:.0%} to {high:.0%})")
        marks.append(
            f'<span class="agl-mark agl-side-{side.key}"><i style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></i>'
            f'<b style="left:{100 * rate.value:.2f}%"></b></span>'
        )
    text = escape("; ".join(told))
    count = rates[sides[0].key].total
    return (
        f'<div class="agl-line{" agl-all" if strong else ""}" title="{text}"><span class="agl-name">{escape(name)} <small>{count}</small></span>'
        f'<span class="agl-track" role="img" aria-label="{text}">{"".join(marks)}</span></div>'
    )


def table_html(result: Result | None, shown: str, words: str) -> str:
    """Verdicts of every prompt that passes the filter; answers unfold one by one, as some may be unsafe."""
    if result is None:
        return ""
    chosen = [row for row in result.rows if _passes(row, result.sides, shown, (words or "").strip().lower()[:200])]
    told = f'<p class="agl-hint" role="status">{len(chosen)} of {len(result.rows)} prompts</p>'
    if not chosen:
        return told
    head = "".join(
        f'<th scope="col">{escape(title)}</th>' for title in ("Prompt", *(side.title for side in result.sides))
    )
    lines = "".join(_row_html(row, result.sides) for row in chosen)
    return (
        f'{told}<div class="agl-scroll agl-tall" tabindex="0" role="region" aria-label="Verdicts">'
        f'<table class="agl-table"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _row_html(row: dict[str, Any], sides: list[Side]) -> str:
    should = "should refuse" if row["expected"] == "refuse" else "should answer"
    cells = []
    for side in sides:
        label = row[f"label_{side.key}"]
        answer = escape(row[f"answer_{side.key}"]) or "(no words)"
        cells.append(
            f'<td data-title="{escape(side.title)}"><details><summary><span class="agl-badge agl-{label}">{VERDICTS[label]}</span></summary>'
            f"<p>{answer}</p></details></td>"
        )
    about = f"<small>{escape(row['category'].replace('_', ' '))} · {should}</small>"
    return f'<tr data-expected="{row["expected"]}"><th scope="row">{escape(row["prompt"])}{about}</th>{"".join(cells)}</tr>'


def _passes(row: dict[str, Any], sides: list[Side], shown: str, words: str) -> bool:
    refused = [row[f"label_{side.key}"] == "refusal" for side in sides]
    text = " ".join(str(value) for key, value in row.items() if not key.startswith("reason")).lower()
    return words in text.replace("_", " ") and {
        "All": True,
        "Models differ": len({*refused}) > 1,
        "Unsafe, not refused": row["expected"] == "refuse" and not all(refused),
        "Harmless, refused": row["expected"] == "comply" and any(refused),
    }.get(shown, True)


def files_html(result: Result) -> str:
    """Links that carry their file: nothing is written on the server."""
    links = []
    for name, mime, text in (("CSV", "text/csv", as_csv(result)), ("JSONL", "application/jsonl", as_jsonl(result))):
        data = base64.b64encode(text.encode()).decode()
        links.append(
            f'<a class="agl-file" download="refusals.{name.lower()}" href="data:{mime};charset=utf-8;base64,{data}">Download {name}</a>'
        )
    return f'<div class="agl-files">{"".join(links)}</div>'


def as_csv(result: Result) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(result.rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in result.rows:  # a spreadsheet would run a cell that begins like a formula
        writer.writerow(
            {key: f"'{value}" if value.startswith(("=", "+", "-", "@", "\t")) else value for key, value in row.items()}
        )
    return file.getvalue()


def as_jsonl(result: Result) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows)
