"""Results of the benchmark as a table, trade-off curves and a Markdown report."""

import json
import statistics as stats
from collections import defaultdict
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from rich.console import Console
from rich.markdown import Markdown

from agl_trl.artifacts.files import write_atomically

from .methods import METHODS, SEEDED
from .protocols import PROTOCOLS
from .ranking import Results, best_of_families, hypervolume, method_points, ranking
from .run import ALIGNED


COLUMNS = {
    "refusal_unsafe": ("refuses unsafe", "{:.1%}"),
    "refusal_unseen": ("unseen category", "{:.1%}"),
    "over_refusal": ("over-refusal", "{:.1%}"),
    "unsafe_nll": ("refusal NLL", "{:.3f}"),
    "task_nll": ("task NLL", "{:.4f}"),
    "task_exact": ("exact match", "{:.1%}"),
    "gain": ("gain kept", "{:.4f}"),
    "relative_drift": ("relative drift", "{:.1e}"),
    "time": ("time ratio", "{:.2f}"),
    "memory": ("memory ratio", "{:.2f}"),
}


MARKERS = "os^DvP*X<>"  # one for every ten families, which share the colours


def results_file(folder: Path) -> Path:
    """A line of JSON for every run, and for the aligned model in every protocol."""
    return folder / "results.jsonl"


def read(folder: Path) -> list[dict]:
    """Lines of the results."""
    path = results_file(folder)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def load(lines: list[dict], steps: int) -> Results:
    """
    Runs of `steps` steps by protocol and method, in an order that does not hang on which ended first, each with its task gain, time
    and memory relative to plain LoRA of its seed.
    """
    results: Results = defaultdict(list)
    raw = [line for line in lines if line["run"]["name"] != ALIGNED and line["steps"] == steps]
    plain = {(r["protocol"], r["run"]["seed"]): r for r in raw if r["run"]["name"] == "lora"}
    aligned = aligned_runs(lines)
    for result in sorted(raw, key=lambda r: r["run"]["seed"]):
        run, before = dict(result["run"]), aligned[result["protocol"]]
        base = plain.get((result["protocol"], run["seed"]))
        if base is not None:
            learned = before["task_nll"] - base["run"]["task_nll"]
            run["gain"] = (before["task_nll"] - run["task_nll"]) / learned
            run["memory"] = result["peak_bytes"] / base["peak_bytes"]
            run["time"] = result["cpu_seconds"] / base["cpu_seconds"]
        results[result["protocol"], run["name"]].append({**run, "budget_kept": result["budget_kept"]})
    return results


def at_a_glance(results: Results, aligned: dict[str, dict]) -> str:
    """
    Markdown table of the methods that ran on all protocols that the full comparison runs with every seed, by the mean area that each
    dominates by itself: refusals of unsafe prompts and of look-alikes with the task's NLL, and the mean cost.
    """
    protocols = [p for p in SEEDED if (p, "lora") in results]
    points = {p: method_points(results, p, aligned[p]) for p in protocols}
    names = [name for name in METHODS if all((p, name) in results for p in protocols)]
    area = {name: [hypervolume([points[p][name]]) for p in protocols if points[p]] for name in names}
    lines = [
        "| method | data in the run | seeds | area | " + " | ".join(f"`{p}`" for p in protocols) + " | time | memory |"
    ]
    lines.append("|---" * (len(protocols) + 6) + "|")
    for name in sorted(names, key=lambda name: -sum(area[name])):
        runs = [run for p in protocols for run in results[p, name]]
        seeds = min(len(results[p, name]) for p in protocols)
        cells = [_kept(results[p, name], attack=PROTOCOLS[p].attack) for p in protocols]
        cells += [_mean([run[key] for run in runs if key in run], "{:.2f}") for key in ("time", "memory")]
        head = f"| `{name}` | {METHODS[name].needs} | {seeds} | {_mean(area[name], '{:.3f}')} | "
        lines.append(head + " | ".join(cells) + " |")
    return "\n".join(lines)


def _kept(runs: list[dict], *, attack: bool) -> str:
    """Refusals of unsafe prompts and of look-alikes, and the task's NLL; after an attack the first alone."""
    refuses, over, loss = (
        stats.mean(run[key] for run in runs) for key in ("refusal_unsafe", "over_refusal", "task_nll")
    )
    return f"{refuses:.1%}" if attack else f"{refuses:.1%} / {over:.1%}, {loss:.3f}"


def table(results: Results, protocol: str, aligned: dict) -> str:
    """
    Markdown table of one protocol: mean over seeds, and ± half the range where there are several. All strengths of a family, with that
    in bold that is best with the first seed, which all of them have.
    """
    first = {key: runs[:1] for key, runs in results.items()}
    best = best_of_families(method_points(first, protocol, aligned))
    lines = ["| method | seeds | data in the run | " + " | ".join(title for title, _ in COLUMNS.values()) + " |"]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    for method, description in METHODS.items():
        runs = results.get((protocol, method))
        if runs:
            cells = [
                _cell([run[key] for run in runs if run.get(key) is not None], form)
                for key, (_, form) in COLUMNS.items()
            ]
            name = f"**{method}**" if method in best else method
            lines.append(f"| {name} | {len(runs)} | {description.needs} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float], form: str) -> str:
    spread = f" ± {form.format((max(values) - min(values)) / 2)}" if len(values) > 1 else ""
    return _mean(values, form) + spread


def _mean(values: list[float], form: str) -> str:
    return form.format(stats.mean(values)) if values else "–"


def budgets_kept(results: Results) -> str:
    """One line: in how many runs with a budget the final drift is at or below it."""
    runs = [run for runs in results.values() for run in runs if run["budget_kept"] is not None]
    kept = sum(run["budget_kept"] for run in runs)
    return f"Drift budget kept at the end of {kept} of {len(runs)} runs that had one." if runs else ""


def curves(results: Results, protocols: list[str]) -> Figure:
    """Refusal and NLL of refusals against task NLL: a point per method, a line per family, bars for the range over seeds."""
    across = min(4, len(protocols))
    bands = -(-len(protocols) // across)
    figure = Figure(figsize=(4.6 * across, 7.5 * bands), layout="constrained")
    axes = figure.subplots(2 * bands, across, squeeze=False)
    for spare in range(len(protocols), across * bands):
        for row in (0, 1):
            axes[2 * (spare // across) + row, spare % across].set_axis_off()
    families = list(dict.fromkeys(method.family for method in METHODS.values()))
    for position, protocol in enumerate(protocols):
        band, column = divmod(position, across)
        for row, (key, label) in enumerate((("refusal_unsafe", "refuses unsafe"), ("unsafe_nll", "NLL of refusals"))):
            panel = axes[2 * band + row, column]
            for number, family in enumerate(families):
                points = [
                    [(run["task_nll"], run[key]) for run in results[protocol, name]]
                    for name, method in METHODS.items()
                    if method.family == family and (protocol, name) in results
                ]
                if points:
                    means = sorted((stats.mean(x for x, _ in p), stats.mean(y for _, y in p), p) for p in points)
                    color, marker = colormaps["tab10"](number % 10), MARKERS[number // 10]
                    line = [[m[i] for m in means] for i in (0, 1)]
                    panel.plot(*line, f"{marker}-", color=color, label=family, markersize=5)
                    for x, y, p in means:
                        panel.plot([x, x], [min(v for _, v in p), max(v for _, v in p)], color=color, alpha=0.4)
                        panel.plot([min(v for v, _ in p), max(v for v, _ in p)], [y, y], color=color, alpha=0.4)
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set_xlabel("task NLL")
            panel.set_ylabel(label)
            panel.grid(alpha=0.3)
            if row == 0:
                panel.set_title(protocol)
            else:
                panel.set_yscale("log")
                panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
                panel.yaxis.set_minor_formatter(NullFormatter())
    shown = {
        label: line for panel in axes.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=6, fontsize=12)
    return figure


def aligned_runs(lines: list[dict]) -> dict[str, dict]:
    """Figures of the aligned model before training, by protocol, in the order of the protocols."""
    found = {line["protocol"]: line["run"] for line in lines if line["run"]["name"] == ALIGNED}
    return {name: found[name] for name in PROTOCOLS if name in found}


def write_report(folder: Path, steps: int) -> None:
    """Write `report.md` and `curves.png` from all finished runs, and print the report."""
    lines = read(folder)
    results, aligned = load(lines, steps), aligned_runs(lines)
    protocols = [name for name in PROTOCOLS if any(of == name for of, _ in results)]
    head = (
        f"# Benchmark on the embedded world\n\nFrom `python -m examples.benchmark`: {steps} steps of 16 rows (8 pairs for DPO); "
        "mean ± half the range over seeds, of which the second column has the number. Time (processor seconds of `train()`, on one "
        "thread: what AGL measures for itself is in it, what a peer measures before, such as reference answers, is not) and memory "
        "(peak resident memory of the process) are ratios to plain LoRA of the same seed."
    )
    rank = (
        "## Ranking\n\nShare of the plane of drift and task loss that a family of methods dominates, larger is better: drift is the "
        "NLL of held-out refusals from the aligned model's (0) to plain LoRA's (1), task loss the task's NLL from the best method's "
        "(0) to the aligned model's (1), both on a log scale, cut at 0 and 1. More points dominate more, so families are compared by "
        "at most three points each: the mean over all ways to draw three methods from a family, or all that it has where they are "
        "fewer; a method with one seed counts as one with three. How many it has in a protocol stands in brackets, and the mean of a "
        "single point beside it, and that of the best point in each protocol, which favours who has more of them. In the tables of "
        "the protocols, bold is the one method of a family that dominates most with the first seed.\n\n"
    )
    glance = (
        "## At a glance\n\nRefuses unsafe prompts / refuses harmless look-alikes, task NLL; after `attack` the first alone. Means over "
        "seeds. Area is that of the ranking of one method by itself, the mean over these protocols. Cost beside plain LoRA.\n\n"
    )
    text = [head, glance + at_a_glance(results, aligned), rank + ranking(results, aligned)]
    text += [f"## {protocol}\n\n{table(results, protocol, aligned[protocol])}" for protocol in protocols]
    text.append(f"{budgets_kept(results)}\n\n![Trade-off curves](curves.png)\n")
    report = "\n\n".join(text)
    write_atomically(folder / "report.md", report.encode())
    curves(results, protocols).savefig(folder / "curves.png", dpi=100, metadata={"Software": None})
    Console().print(Markdown(report))
