"""
What AGL costs relative to TRL's own trainer:

    python -m examples.benchmark.overhead                           # the embedded model
    python -m examples.benchmark.overhead --shape 135m --steps 20   # random weights of a 135 M Llama shape, 2,048 tokens a step
    python -m examples.benchmark.overhead --shape 8b --steps 20     # bfloat16 on a GPU, 4,096 tokens a step
    python -m examples.benchmark.overhead --kind dpo

Step times come from trainers that take turns in one process, memory from a fresh process each.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown

from agl_trl.artifacts.files import write_atomically

from ..run import quiet
from .fisher import pass_ratios
from .growth import growth
from .memory import apart
from .peer import installed
from .shapes import SHAPES
from .turns import SFT_ONLY, VARIANTS, step_ratios
from .waits import waits_per_step


PARTS = ("time", "memory", "fisher", "growth", "waits")
TITLES = {
    "time": (
        "Step time relative to TRL: mean over a cycle of eight steps of the medians over cycles, taken in turns; 95 % bootstrap "
        "interval; AGL's own work, timed alone"
    ),
    "memory": "Peak memory of a whole run, Fisher pass included, relative to TRL: each in a process of its own",
    "fisher": "Fisher pass relative to an SFT epoch over the same rows",
    "growth": "Fitted exponents of growth: 1 is proportional",
    "waits": "Calls per step that wait for the device",
}


def main(
    shape: Annotated[str, typer.Option(help=f"One of: {', '.join(SHAPES)}.")] = "embedded",
    kind: Annotated[str, typer.Option(help="`sft` or `dpo`.")] = "sft",
    steps: Annotated[int, typer.Option(min=2, help="Timed steps of every variant.")] = 200,
    only: Annotated[str | None, typer.Option(help=f"Comma-separated, of: {', '.join(list(VARIANTS)[1:])}.")] = None,
    parts: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(PARTS),
    rows: Annotated[int, typer.Option(min=4, help="Rows of the Fisher pass and its epoch.")] = 32,
    rounds: Annotated[
        int, typer.Option(min=1, help="Timed rounds of epoch and Fisher passes, processes per peak.")
    ] = 3,
    output_dir: Annotated[Path, typer.Option()] = Path("outputs/overhead"),
) -> None:
    """Measure, print and write the tables, as Markdown and JSON."""
    quiet()
    for name, given, known in (("shape", [shape], SHAPES), ("part", parts.split(","), PARTS)):
        if unknown := [value for value in given if value not in known]:
            raise typer.BadParameter(f"there is no {name} '{unknown[0]}'; known are {', '.join(known)}")
    if kind not in ("sft", "dpo"):
        raise typer.BadParameter("`--kind` is `sft` or `dpo`")
    names = [name for name in VARIANTS if kind == "sft" or name not in SFT_ONLY] if only is None else only.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise typer.BadParameter(f"there is no variant '{unknown[0]}'; known are {', '.join(VARIANTS)}")
    if SHAPES[shape].accelerator and not torch.cuda.is_available():
        raise typer.BadParameter(f"the shape {shape} needs a GPU, and there is none")
    if "alignment-risk" in names and not installed():
        Console().print("alignment-risk is not installed and is left out.")
        names.remove("alignment-risk")
    names = ["TRL", *(name for name in names if name != "TRL")]
    results: dict[str, list[dict[str, Any]]] = {}
    for part in parts.split(","):
        if part == "time":
            results[part] = step_ratios(names, SHAPES[shape], kind, steps)
        elif part == "memory":
            results[part] = memory_ratios(names, shape, kind, repeats=rounds)
        elif part == "fisher":
            results[part] = pass_ratios(shape, rows, rounds)
        elif part == "growth":
            results[part] = growth(repeats=20)
        else:
            results[part] = waits_per_step(names, SHAPES[shape], kind)
    threads = "one GPU" if SHAPES[shape].accelerator else f"{torch.get_num_threads()} CPU threads"
    text = [f"# Overhead: {shape}, {kind.upper()}, {threads}, torch {torch.__version__}"]
    text += [f"## {TITLES[part]}\n\n{table(lines)}" for part, lines in results.items()]
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(output_dir / f"{shape}-{kind}.json", (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(output_dir / f"{shape}-{kind}.md", ("\n\n".join(text) + "\n").encode())
    Console().print(Markdown("\n\n".join(text)))


def memory_ratios(names: list[str], shape: str, kind: str, repeats: int, steps: int = 3) -> list[dict[str, Any]]:
    """Per variant the least of its peaks over `repeats` processes, and its ratio to TRL's."""
    peaks = {name: min(apart(name, shape, kind, steps)["peak"] for _ in range(repeats)) for name in names}
    return [
        {"variant": name, "ratio of peak memory": peak / peaks["TRL"], "peak MB": peak / 1e6}
        for name, peak in peaks.items()
    ]


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown table; figures to three significant digits or three decimals."""
    columns = list(dict.fromkeys(key for line in lines for key in line))
    rows = [[_cell(line.get(column, "–")) for column in columns] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if value < 10 else f"{value:,.0f}"
    return str(value)


if __name__ == "__main__":
    typer.run(main)
