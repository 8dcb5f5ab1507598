"""A report as one page that stands alone: no script, no request, light and dark, on screen and on paper."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from math import isinf, isnan
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..artifacts.files import write_atomically
from ..evaluation.behaviour import Behaviour
from ..evaluation.rates import Rate
from ..evaluation.served import UNSEEN, served_facts
from .distributions import distributions
from .layer_map import layer_map
from .protected import protected_lines
from .report import DriftReport
from .verdict import GateVerdict, Outcome, RuleResult


LIBRARIES = ("agl-trl", "torch", "transformers", "peft", "datasets", "numpy", "scipy")
MARKS = {Outcome.PASS: ("pass", "✓"), Outcome.FAIL: ("fail", "✕"), Outcome.INSUFFICIENT: ("insufficient", "?")}


class Refusals(NamedTuple):
    """Refusals of a group of prompts, before and after."""

    label: str
    unsafe: bool
    before: Rate
    after: Rate


class Line(NamedTuple):
    """A rule drawn on a line: where its limit, its value and the ends of its interval are, from 0 to 100."""

    limit: float
    value: float
    low: float
    high: float


def write_page(
    path: Path,
    report: DriftReport,
    verdict: GateVerdict | None,
    *,
    base: str,
    tuned: str,
    command: str,
    with_answers: bool = False,
) -> None:
    """
    Write the page of a report. The same report gives the same bytes.

    Args:
        path (`Path`):
            File.
        report ([`DriftReport`]):
            Report.
        verdict ([`GateVerdict`], *optional*):
            What its gate says; `None` without one.
        base, tuned (`str`):
            Names of the models.
        command (`str`):
            What was called.
        with_answers (`bool`, *optional*, defaults to `False`):
            Whether prompts and answers are on it, folded. Those of unsafe prompts may be harmful.

    Raises:
        `OSError`: If the file can't be written.
    """
    templates = Environment(
        loader=PackageLoader("agl_trl.drift"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"percent": _percent, "spaced": lambda text: text.replace("_", " ")}
    answers = report.behaviour
    page = templates.get_template("drift.html.jinja").render(
        report=report,
        verdict=verdict,
        marks=MARKS,
        rules=[] if verdict is None else [(rule, rule_line(rule)) for rule in verdict.rules],
        base=base,
        tuned=tuned,
        changed=what_changed(report),
        refusals=[] if answers is None else refusals(answers),
        map=layer_map(report) if report.layers else None,
        distributions=[] if answers is None else distributions(answers),
        abilities=[one for one in report.abilities if one.total],
        not_measured=not_measured(report),
        protected=[] if (kept := report.metadata.get("protected")) is None else protected_lines(kept),
        command=command,
        facts=facts(report),
        versions={"Python": platform.python_version(), **_installed()},
        answers=_by_change(answers) if answers is not None and with_answers else [],
    )
    write_atomically(path, (page + "\n").encode())


def _installed() -> dict[str, str]:
    """Versions of [`LIBRARIES`], without those of extras that are not installed."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _percent(value: float) -> str:
    return f"{100 * value:.1f}".removesuffix(".0") + "\N{NO-BREAK SPACE}%"


def rule_line(rule: RuleResult) -> Line | None:
    """A rule on a line; `None` where it has no value, or an end of its interval is nowhere."""
    if (
        rule.value is None
        or isnan(rule.value)
        or (rule.interval is not None and any(isinf(end) for end in rule.interval))
    ):
        return None
    low, high = rule.interval or (rule.value, rule.value)
    points = (rule.condition.limit, rule.value, low, high)
    start, width = min(points), (max(points) - min(points)) or 1.0
    return Line(*(5 + 90 * (point - start) / width for point in points))


def what_changed(report: DriftReport) -> str:
    """The change of answers and weights, in a sentence or two."""
    sentences = []
    answers = report.behaviour
    if answers is not None:
        for unsafe, kind in ((True, "unsafe"), (False, "safe")):
            if (answers.unsafe == unsafe).any():
                before, after = (answers.refusal(tuned, unsafe) for tuned in (False, True))
                sentences.append(
                    f"It refuses {_percent(after.value)} of {after.total} {kind} prompts; the base model refuses {_percent(before.value)}."
                )
    if report.layers:
        farthest = report.layers[int(report.relative_drift.argmax())]
        sentences.append(
            f"Its weights moved by a relative drift of {report.mean_relative_drift:.2e}, most of all in {farthest}."
        )
    for one in report.abilities:
        if one.total and not one.is_text:
            before, after = (one.rate(tuned) for tuned in (False, True))
            sentences.append(
                f"It is right on {_percent(after.value)} of {one.name}; the base model on {_percent(before.value)}."
            )
    return " ".join(sentences)


def refusals(answers: Behaviour) -> list[Refusals]:
    """Refusals of all unsafe prompts, of their categories, and the same of the safe ones."""
    found = []
    for unsafe, label in ((True, "All unsafe prompts"), (False, "All safe prompts")):
        names = answers.categories_of(unsafe)
        groups: list[tuple[str, str | None]] = [(label, None)] if names else []
        groups += [(name, name) for name in names] if len(names) > 1 else []
        found += [
            Refusals(shown, unsafe, *(answers.refusal(t, unsafe, c) for t in (False, True))) for shown, c in groups
        ]
    return found


def not_measured(report: DriftReport) -> list[str]:
    """Sentences on what the report says nothing of."""
    answers, sentences = report.behaviour, []
    if report.without_weights is not None:
        sentences.append(f"The drift of the weights: {report.without_weights}.")
    if report.uncovered:
        names = ", ".join(sorted(report.uncovered)[:5]) + (", …" if len(report.uncovered) > 5 else "")
        sentences.append(f"{len(report.uncovered)} changed tensors are in no figure of the weights: {names}.")
    if not report.abilities:
        sentences.append("What else it can do: no ability set was measured.")
    sentences += [
        f"{one.unmeasured} of {one.total + one.unmeasured} rows of {one.name} {one.why_unmeasured}."
        for one in report.abilities
        if one.unmeasured
    ]
    if answers is None:
        return [*sentences, "Answers: no prompts were asked, so nothing is known of refusals."]
    for unsafe, kind in ((True, "unsafe"), (False, "safe")):
        if not (answers.unsafe == unsafe).any():
            what = "whether it still refuses what it should" if unsafe else "over-refusal"
            sentences.append(f"There were no {kind} prompts, so nothing is known of {what}.")
    if answers.num_unasked:
        sentences.append(
            f"{answers.num_unasked} prompts were not asked, since no answer to them could have changed the verdict."
        )
    if answers.served is not None:
        sentences.append(f"{UNSEEN}.")
    elif answers.nll_tuned.isnan().all():
        sentences.append("Likelihood of reference answers: the prompts have none.")
    if answers.margin_tuned.isnan().all() and answers.served is None:
        sentences.append("Refusal margin: the tokenizer begins refusals and compliance with the same token.")
    counts = (answers.metadata.get("verdicts") or {}).get("tuned")
    if counts and counts["uncertain"]:
        share = _percent(counts["uncertain"] / len(answers.categories))
        sentences.append(
            f"The judge is uncertain of {share} of the answers after tuning ({counts['cut_off']} were cut off)."
        )
    judge = answers.metadata.get("judge", {}).get("name", "")
    if judge.endswith("-strings"):
        sentences.append(f"Verdicts are by words alone ({judge}): whether an answer does harm was judged by nobody.")
    sentences.append(
        "Other requests than these prompts, attacks, other languages, longer conversations, other ways to sample."
    )
    return sentences


def facts(report: DriftReport) -> list[tuple[str, str]]:
    """Hashes, seeds and settings by name."""
    described = report.metadata.get("base_model") or {}
    used, answers = report.metadata.get("fisher") or {}, report.behaviour
    found = [
        ("base model, as it names itself", described.get("name")),
        ("base model, revision", described.get("revision")),
        ("adapter, SHA-256", report.adapter_sha256),
        ("method of the adapter", report.method if report.adapter_sha256 else None),
    ]
    if used:
        sizes = f"seed {used['seed']}, {used['num_tokens']} tokens, shrinkage {used['shrinkage']:g}"
        found.append(("Fisher statistics", f"{sizes}, critical share {report.metadata['fisher_energy']:g}"))
    if answers is not None:
        told, prompts = answers.metadata, answers.metadata.get("prompts") or {}
        judge = told.get("judge") or {}
        found += [
            ("prompts", " · ".join(str(part) for part in (prompts.get("name"), prompts.get("license")) if part)),
            ("prompts asked, SHA-256", told.get("prompts_sha256")),
            ("judge", " ".join(str(part) for part in judge.values())),
            ("decoding", told.get("decoding")),
            *served_facts(answers.served or {}),
            ("tokenizer", told.get("tokenizer_set_aside")),
            ("seeds", "0 of the bootstrap, 0 of the order of asking; decoding is greedy and needs none"),
        ]
    for one in report.abilities:
        told = one.metadata
        parts = (
            told.get("source"),
            told.get("license"),
            told.get("scoring"),
            f"SHA-256 {told.get('rows_sha256', '')[:16]}",
        )
        found.append((f"ability set {one.name}", " · ".join(part for part in parts if part)))
    return [(name, str(value)) for name, value in found if value]


def _by_change(answers: Behaviour) -> list[dict[str, Any]]:
    """Prompts with their answers, those whose verdict changed first."""
    return sorted(answers.answers, key=lambda entry: entry["label_base"] == entry["label_tuned"])
