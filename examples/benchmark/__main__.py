"""
Train every method on every protocol with every seed, and report what each kept and what it cost:

    python -m examples.benchmark --quick                      # a few methods, one task, one seed: under 10 minutes on 2 cores
    python -m examples.benchmark                              # core methods on everything, all on two protocols: 2.5 hours on 2 cores
    python -m examples.benchmark --methods lora,agl-3,replay --protocols steps,hostile-10 --seeds 3

Every finished run is one line of `--output-dir`/results.jsonl; a run that is already there is not repeated, so an interrupted
comparison goes on where it stopped. The published ones are `examples/benchmark/results.jsonl`: copied into `--output-dir`, they are
reported again, or gone on from.
"""

import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agl_trl.artifacts.files import write_atomically
from agl_trl.miniworld import TASKS

from .methods import METHODS, QUICK, SEEDED, made_alike, wanted
from .protocols import PROTOCOLS, trained_alike
from .report import ALIGNED, read, results_file, write_report
from .run import aligned, quiet, run_one, start_worker
from .setting import published_statistics


STEPS = 150
# Of a run on one thread, evaluation included: the mean over the full comparison.
SECONDS_PER_STEP = 0.15


def main(
    methods: Annotated[str | None, typer.Option(help=f"Comma-separated, of: {', '.join(METHODS)}.")] = None,
    protocols: Annotated[str | None, typer.Option(help=f"Comma-separated, of: {', '.join(PROTOCOLS)}.")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of every run.")] = STEPS,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 2,
    quick: Annotated[bool, typer.Option(help="A few methods, the first task, one seed.")] = False,
    output_dir: Annotated[Path, typer.Option()] = Path("outputs/benchmark"),
) -> None:
    """Run what is missing, then write `report.md`, `curves.png` and print the table."""
    chosen = _choice(methods, QUICK if quick else tuple(METHODS), METHODS, "method")
    full = not (methods or protocols or quick)
    chosen_protocols = _choice(protocols, TASKS[:1] if quick else tuple(PROTOCOLS), PROTOCOLS, "protocol")
    quiet()
    lines = read(output_dir)
    plan = planned(chosen, chosen_protocols, 1 if quick else seeds, steps, lines, full=full)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    minutes = len(plan) * steps * SECONDS_PER_STEP / 60 / workers
    typer.echo(f"{len(plan)} trainings of {steps} steps, {workers} at a time: about {max(1, round(minutes))} minutes.")
    # Memory that is freed stays with its process: a tenth of the time went into pages given back and asked for again.
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    context = get_context("forkserver")
    context.set_forkserver_preload(["examples.benchmark.run"])  # imported once, for all processes
    # A process for every run: memory that another run has left behind would count as its own.
    with (
        Progress(*columns, speed_estimate_period=3600) as progress,
        ProcessPoolExecutor(workers, context, start_worker, max_tasks_per_child=1) as pool,
    ):
        if plan:
            pool.submit(published_statistics, output_dir).result()
        there = {line["protocol"] for line in lines if line["run"]["name"] == ALIGNED}
        fresh = [name for name in chosen_protocols if name not in there]
        _add(output_dir, lines, list(pool.map(aligned, fresh)))
        bar = progress.add_task("", total=len(plan))
        runs = {pool.submit(run_one, *run, steps, output_dir): run for run in plan}
        for future in as_completed(runs):
            pairs, seed = runs[future]
            _add(output_dir, lines, future.result())
            of, by = (", ".join(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
            progress.update(bar, advance=1, description=f"{of} · {by} · seed {seed}")
    shutil.rmtree(output_dir / "scratch", ignore_errors=True)
    write_report(output_dir, steps)


def planned(
    methods: tuple[str, ...], protocols: tuple[str, ...], seeds: int, steps: int, lines: list[dict], *, full: bool
) -> list[tuple[tuple[tuple[str, str], ...], int]]:
    """
    Trainings that have no result yet: the protocols and methods that share one, and the seed.

    Args:
        methods (`tuple[str, ...]`):
            Names of methods.
        protocols (`tuple[str, ...]`):
            Names of protocols.
        seeds (`int`):
            Number of seeds.
        steps (`int`):
            Optimizer steps of every run.
        lines (`list[dict]`):
            The results that are there.
        full (`bool`):
            Whether only what the full comparison wants is planned.
    """
    done = {(line["protocol"], line["run"]["name"], line["run"]["seed"], line["steps"]) for line in lines}
    plan = []
    for seed in range(seeds):
        for together in trained_alike(protocols):
            for alike in made_alike(methods):
                missing = tuple(
                    (protocol, method)
                    for protocol in together
                    for method in alike
                    if (protocol, method, seed, steps) not in done
                    and (METHODS[method].preferences or not PROTOCOLS[protocol].preferences)
                    and (not full or wanted(method, protocol, seed))
                )
                if missing:
                    plan.append((missing, seed))
    # What is reported with every seed comes first, for whoever stops before the end.
    return sorted(plan, key=lambda run: run[0][0][0] not in SEEDED)


def _add(folder: Path, lines: list[dict], new: list[dict]) -> None:
    lines += new
    write_atomically(results_file(folder), "".join(json.dumps(line) + "\n" for line in lines).encode())


def _choice(given: str | None, default: tuple[str, ...], known: dict, kind: str) -> tuple[str, ...]:
    names = default if given is None else tuple(given.split(","))
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"there is no {kind} '{name}'; known are {', '.join(known)}")
    return names


if __name__ == "__main__":
    typer.run(main)
