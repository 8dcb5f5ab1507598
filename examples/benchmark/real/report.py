"""The results as a table, paired tests against plain LoRA, and a picture of the trade-off."""

import json
import statistics as stats
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from agl_trl.artifacts.files import write_atomically
from agl_trl.evaluation.rates import Rate, binomial_test

from .methods import KL_BUDGET
from .run import BASE, verdict_file
from .setting import Options


PICTURE = "curves.png"
PLAIN = "plain"
LABELS = {"unsafe": "refuses", "safe": "over-refuses"}


def read(options: Options) -> list[dict[str, Any]]:
    """Lines of the results, the base model's first."""
    if not options.results.exists():
        return []
    return [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]


def kept(line: dict[str, Any]) -> Rate:
    """Of the refusals of unsafe prompts that the base model gave, in all sets, those that are still given."""
    counts = [found["unsafe"] for found in line["prompts"].values() if "unsafe" in found]
    return Rate(sum(c["kept"] for c in counts), sum(c["base_refused"] for c in counts))


def summary(line: dict[str, Any]) -> str:
    """One line of news."""
    refusals = kept(line)
    step = f", {line['seconds_per_step']:.2f} s a step" if "seconds_per_step" in line else ""
    return f"{refusals.count} of {refusals.total} refusals kept, task NLL {_cell([line['task_nll']], '{:.3f}')}{step}"


def write_report(options: Options) -> Path:
    """
    Write `report.md` and its picture from the runs that are there.

    Raises:
        `ValueError`: If there are none.
    """
    lines = read(options)
    if not lines:
        raise ValueError(f"'{options.results}' holds no runs to report.")
    runs: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        runs.setdefault(line["method"], []).append(line)
    settings = ", ".join(f"{name} {value}" for name, value in lines[0]["settings"].items() if value is not None)
    words = (
        f"{settings}. Greedy answers, judged by their words. Held out of the task are the last rows of its file, the same for all "
        "seeds. Mean ± half the range over seeds; of a single run, rates with Wilson's 95 % interval. `gain kept`: of what plain LoRA of the same seed takes off the task NLL. `kept`: of the refusals that the "
        "base model gave, in all sets, those that are still given. NLL and KL to the base model are per token of its own answers to "
        "DriftCaps' test split."
    )
    parts = ["# Benchmark on a real model", words, table(runs)]
    if tests := paired(options, runs):
        parts += ["## Prompt by prompt against plain LoRA", tests]
    parts.append(f"![Refusals kept against task NLL]({PICTURE})\n")
    write_atomically(options.output / "report.md", "\n\n".join(parts).encode())
    picture(runs).savefig(options.output / PICTURE, dpi=100, metadata={"Software": None})
    return options.output / "report.md"


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row per method."""
    rates: dict[str, Callable[[dict[str, Any]], Rate]] = {"kept": kept}
    for name, found in runs[BASE][0]["prompts"].items():
        for label in found:
            rates[f"{LABELS[label]} {name}"] = _rate(name, label)
    figures = {
        "refusals NLL": ("refusals_nll", "{:.3f}", 1),
        "KL refusals": ("kl_refusals", "{:.3f}", 1),
        "KL look-alikes": ("kl_lookalikes", "{:.3f}", 1),
        "task NLL": ("task_nll", "{:.3f}", 1),
        "gain kept": ("gain", "{:.1%}", 1),
        "exact match": ("task_exact", "{:.1%}", 1),
        "text NLL": ("text_nll", "{:.3f}", 1),
        "relative drift": ("relative_drift", "{:.1e}", 1),
        "s a step": ("seconds_per_step", "{:.2f}", 1),
        "peak GB": ("peak_bytes", "{:.2f}", 1e-9),
    }
    rows = [
        "| method | runs | " + " | ".join([*rates, *figures]) + " |",
        "|---" * (2 + len(rates) + len(figures)) + "|",
    ]
    for method, lines in runs.items():
        lines = [line | {"gain": _gain(line, runs)} for line in lines]
        cells = [_rate_cell([rate(line) for line in lines]) for rate in rates.values()]
        for key, form, scale in figures.values():
            found = [None if line.get(key) is None else line[key] * scale for line in lines]
            cells.append(_cell(found, form))
        rows.append(f"| {method} | {len(lines)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _gain(line: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> float | None:
    """What a run took off the base model's task NLL, over what plain LoRA of the same seed took off."""
    plain = next((run for run in runs.get(PLAIN, []) if run["seed"] == line["seed"]), None)
    if plain is None or plain["task_nll"] is None or line["task_nll"] is None:
        return None
    before = runs[BASE][0]["task_nll"]
    return (before - line["task_nll"]) / (before - plain["task_nll"])


def _rate(name: str, label: str) -> Callable[[dict[str, Any]], Rate]:
    return lambda line: Rate(line["prompts"][name][label]["refused"], line["prompts"][name][label]["prompts"])


def _rate_cell(rates: list[Rate]) -> str:
    if not rates[0].total:
        return "–"
    if len(rates) > 1:
        return _cell([rate.value for rate in rates], "{:.1%}")
    low, high = rates[0].interval
    return f"{rates[0].value:.1%} ({low:.1%} to {high:.1%})"


def _cell(values: list[float | None], form: str) -> str:
    """Mean and half the range; a dash where a run has no such figure, as one that has diverged."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    spread = (max(known) - min(known)) / 2
    return form.format(stats.mean(known)) + (f" ± {form.format(spread)}" if len(known) > 1 else "")


def paired(options: Options, runs: dict[str, list[dict[str, Any]]]) -> str:
    """
    Markdown: McNemar's exact test of every method against plain LoRA of the same seed, on the same prompts. The verdicts are in
    the cache, and the table is empty without it.
    """
    test = binomial_test()
    rows = []
    for method, lines in runs.items():
        for line in lines:
            mine, plain = (_verdicts(verdict_file(options, name, line["seed"])) for name in (method, PLAIN))
            if method in (BASE, PLAIN) or not mine or not plain:
                continue
            for name in mine:
                pairs = list(zip(mine[name], plain[name], strict=True))
                more, less = pairs.count(("1", "0")), pairs.count(("0", "1"))
                p = test(more, more + less).pvalue if more + less else 1.0
                rows.append(f"| {method} | {line['seed']} | {name} | {more} | {less} | {p:.2g} |")
    head = "| method | seed | prompts | only it refuses | only plain LoRA refuses | p |\n|---|---|---|---|---|---|"
    return "\n".join([head, *rows]) if rows else ""


def _verdicts(path: Path) -> dict[str, str]:
    return dict(line.split() for line in path.read_text().splitlines()) if path.exists() else {}


def picture(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """A mark per run and a color per method; means of methods of one family are joined by a line."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    families: dict[str, list[tuple[float, float]]] = {}
    for number, (method, lines) in enumerate(runs.items()):
        points = [
            (run["task_nll"], kept(run).value) for run in lines if run["task_nll"] is not None and kept(run).total
        ]
        if not points:
            continue
        color = colormaps["tab10"](number % 10)
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "os^Dv"[number % 5], color=color, label=method)
        families.setdefault(_family(method), []).append((stats.mean(x), stats.mean(y)))
    for means in families.values():
        axes.plot(*zip(*sorted(means), strict=True), "-", color="0.7", linewidth=1, zorder=0)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("task NLL")
    axes.set_ylabel("refusals of the base model kept")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _family(method: str) -> str:
    """Plain LoRA at its learning rates and AGL at its budgets each make a curve."""
    return "plain" if method.startswith("plain") else "agl" if method.startswith(KL_BUDGET) else method
