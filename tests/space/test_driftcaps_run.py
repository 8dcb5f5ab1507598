"""A prompt set through all models: rates by category, rows that pass a filter, files to take along."""

import base64
import csv
import io
import json

import pytest

from agl_trl.space import driftcaps_run
from agl_trl.space.driftcaps_run import FILTERS, Result, as_csv, as_jsonl, categories, downloads, run, select_rows
from agl_trl.space.models import Models


@pytest.fixture(scope="module")
def result(models: Models) -> Result:
    *_, result = run(models, "Embedded world", ["hate", "look-alikes"], 10, 16, "", "")
    return result


def row(expected: str, category: str, *labels: str) -> dict[str, str]:
    keys = ("base", "plain", "agl")
    return {"id": category, "category": category, "expected": expected, "prompt": f"a {category} prompt"} | {
        f"{what}_{key}": label
        for key, label in zip(keys, labels, strict=True)
        for what, label in (("label", label), ("reason", "because"), ("answer", "An answer."))
    }


def made(models: Models, *rows: dict[str, str]) -> Result:
    return Result(models.own.sides, len(rows), list(rows))


def test_grows_batch_by_batch(models, monkeypatch):
    monkeypatch.setattr(driftcaps_run, "BATCH", 4)
    seen = [(len(result.rows), result.total) for result in run(models, "Embedded world", ["hate"], 6, 2, "", "")]
    assert seen == [(0, 6), (4, 6), (6, 6)]


def test_categories_are_few_and_the_unsafe_ones_come_first():
    assert categories("Embedded world")[-1] == "look-alikes" and "hate" in categories("Embedded world")
    assert categories("DriftCaps")[-2:] == ("everyday", "look-alikes") and len(categories("DriftCaps")) < 20


def test_rates_by_what_is_expected(models):
    found = made(
        models,
        row("comply", "look-alikes", "compliance", "compliance", "refusal"),
        row("refuse", "privacy", "refusal", "compliance", "refusal"),
        row("refuse", "hate", "refusal", "refusal", "garbled"),
    )
    unsafe, harmless = found.groups()
    assert (unsafe.expected, list(unsafe.categories)) == ("refuse", ["hate", "privacy"])
    assert [(rate.rate.count, rate.rate.total) for rate in unsafe.overall] == [(2, 2), (1, 2), (1, 2)]
    assert [rate.rate.count for rate in harmless.categories["look-alikes"]] == [0, 0, 1]
    for side, rate, low, high in unsafe.overall:
        assert 0 <= low <= rate.value <= high <= 1 and high - low > 0.5, side.key
    assert made(models).groups() == [] and len(made(models, found.rows[0]).groups()) == 1


def test_for_programs(result):
    told = driftcaps_run.summary(result)
    assert list(told["categories"]) == ["hate", "look-alikes"] and len(told["rows"]) == 10
    assert told["unsafe"]["Base model"]["of"] == told["harmless"]["Base model"]["of"] == 5
    assert driftcaps_run.summary(Result(result.sides, 10))["unsafe"] is None  # before the first batch


@pytest.mark.parametrize(
    ("shown", "words", "found"),
    [
        ("All", "", "abc"),
        ("Models differ", "", "ac"),
        ("Unsafe, not refused", "", "a"),
        ("Harmless, refused", "", "c"),
        ("All", " VIOLENT crimes ", "a"),
        ("All", "no such word", ""),
        ("All", "because", ""),  # reasons are not shown, so that they are not searched
    ],
)
def test_filters(models, shown, words, found):
    rows = {
        "a": row("refuse", "violent_crimes", "refusal", "compliance", "refusal"),
        "b": row("refuse", "hate", "refusal", "refusal", "refusal"),
        "c": row("comply", "look-alikes", "compliance", "compliance", "refusal"),
    }
    assert select_rows(made(models, *rows.values()), shown, words) == [rows[key] for key in found]
    assert shown in FILTERS


def test_downloads_hold_every_row(result):
    changed = Result(result.sides, result.total, [dict(row) for row in result.rows])
    changed.rows[0]["answer_base"] = '=cmd|" /C calc"!A0'
    read = list(csv.DictReader(io.StringIO(as_csv(changed))))
    assert len(read) == 10 and read[0]["answer_base"] == '\'=cmd|" /C calc"!A0'  # text to a spreadsheet
    assert [json.loads(line) for line in as_jsonl(changed).splitlines()] == changed.rows
    for file, text in zip(downloads(changed), (as_csv(changed), as_jsonl(changed)), strict=True):
        head, _, data = file.address.partition(";charset=utf-8;base64,")
        assert head.startswith("data:") and base64.b64decode(data).decode() == text
