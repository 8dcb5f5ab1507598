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

from .methods import METHODS
from .protocols import PROTOCOLS
from .ranking import best_of_families, method_points, ranking


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


def load(folder: Path, steps: int) -> dict[tuple[str, str], list[dict]]:
    """Runs of `steps` steps by protocol and method, each with its task gain and time relative to plain LoRA of its seed."""
    results: dict[tuple[str, str], list[dict]] = defaultdict(list)
    raw = [json.loads(path.read_text()) for path in sorted((folder / "runs").glob(f"*__{steps}.json"))]
    plain = {(r["protocol"], r["run"]["seed"]): r for r in raw if r["run"]["name"] == "lora"}
    lines = aligned_lines(folder)
    for result in raw:
        run, aligned = result["run"], lines[result["protocol"]]
        base = plain.get((result["protocol"], run["seed"]))
        if base is not None:
            learned = aligned["task_nll"] - base["run"]["task_nll"]
            run["gain"] = (aligned["task_nll"] - run["task_nll"]) / learned
            run["memory"] = result["peak_bytes"] / base["peak_bytes"]
            if "cpu_seconds" in result and "cpu_seconds" in base:
                run["time"] = result["cpu_seconds"] / base["cpu_seconds"]
        results[result["protocol"], run["name"]].append({**run, "budget_kept": result["budget_kept"]})
    return results


def table(results: dict[tuple[str, str], list[dict]], protocol: str, aligned: dict) -> str:
    """
    Markdown table of one protocol: mean over seeds, and ± half the range where there are several. All strengths of a family, with its
    best one in bold.
    """
    best = best_of_families(method_points(results, protocol, aligned))
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
    if not values:
        return "–"
    spread = (max(values) - min(values)) / 2
    return form.format(stats.mean(values)) + (f" ± {form.format(spread)}" if len(values) > 1 else "")


def budgets_kept(results: dict[tuple[str, str], list[dict]]) -> str:
    """One line: in how many runs with a budget the final drift is at or below it."""
    runs = [run for runs in results.values() for run in runs if run["budget_kept"] is not None]
    kept = sum(run["budget_kept"] for run in runs)
    return f"Drift budget kept at the end of {kept} of {len(runs)} runs that had one." if runs else ""


def curves(results: dict[tuple[str, str], list[dict]], protocols: list[str]) -> Figure:
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


def aligned_lines(folder: Path) -> dict[str, dict]:
    """Figures of the aligned model before training, by protocol, in the order of the protocols."""
    paths = {name: folder / "aligned" / f"{name}.json" for name in PROTOCOLS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def write_report(folder: Path, steps: int) -> None:
    """Write `report.md` and `curves.png` from all finished runs, and print the report."""
    results = load(folder, steps)
    protocols = [name for name in PROTOCOLS if any(of == name for of, _ in results)]
    head = (
        f"# Benchmark on the embedded world\n\nFrom `python -m examples.benchmark`: {steps} steps of 16 rows (8 pairs for DPO); "
        "mean ± half the range over seeds, of which the second column has the number. Time (processor seconds of the training, on one "
        "thread; – where it was not taken) and memory (peak resident memory of the process) are ratios to plain LoRA of the same seed."
    )
    rank = (
        "## Ranking\n\nShare of the plane of drift and task loss that a family of methods dominates, larger is better: drift is the "
        "NLL of held-out refusals from the aligned model's (0) to plain LoRA's (1), task loss the task's NLL from the best method's "
        "(0) to the aligned model's (1), both on a log scale, cut at 0 and 1. More points dominate more, so "
        "families are compared by three points each: the mean over all ways to draw three methods from a family, or all that it has "
        "where they are fewer; how many it has in a protocol stands in brackets, and the mean of a single point beside it, and that "
        "of the best point in each protocol, which favours who has more of them. In the tables of the protocols, bold is the one "
        "method of a family that dominates most.\n\n"
    )
    lines = aligned_lines(folder)
    text = [head, rank + ranking(results, lines)]
    text += [f"## {protocol}\n\n{table(results, protocol, lines[protocol])}" for protocol in protocols]
    text.append(f"{budgets_kept(results)}\n\n![Trade-off curves](curves.png)\n")
    report = "\n\n".join(text)
    write_atomically(folder / "report.md", report.encode())
    curves(results, protocols).savefig(folder / "curves.png", dpi=100, metadata={"Software": None})
    Console().print(Markdown(report))
