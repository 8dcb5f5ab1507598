"""
Train every method on every protocol with every seed, and report what each kept and what it cost:

    python -m examples.benchmark --quick                      # a few methods, one task, one seed: under 10 minutes on 2 cores
    python -m examples.benchmark                              # the core methods on everything, all on the first task
    python -m examples.benchmark --methods lora,agl-3,replay --protocols steps,hostile-10 --seeds 3

Every finished run is one JSON file under `--output-dir`/runs; a run that is already there is not repeated, so an interrupted
comparison goes on where it stopped.
"""

import json
import shutil
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer
from datasets import disable_progress_bars
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging

from agl_trl import FisherStatistics
from agl_trl.artifacts import write_atomically
from agl_trl.demo import evaluate, heldout_prompts
from agl_trl.drift import DriftReport
from agl_trl.estimation import estimate_fisher
from agl_trl.miniworld import TASKS, alignment_dataset, load_model, load_tokenizer

from .lookahead import prefixed
from .methods import CORE, METHODS, QUICK, Setting
from .protocols import PROTOCOLS, attack, test_rows, training_rows
from .report import write_report


STEPS = 150
SECONDS_PER_STEP = 0.14  # of a run on one thread, evaluation included


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
    everywhere = chosen if methods or protocols or quick else CORE
    chosen_protocols = _choice(protocols, TASKS[:1] if quick else tuple(PROTOCOLS), PROTOCOLS, "protocol")
    _quiet()
    plan = [
        (protocol, method, seed)
        for seed in range(1 if quick else seeds)
        for protocol in chosen_protocols
        for method in chosen
        if not _path(output_dir, protocol, method, seed, steps).exists()
        and (METHODS[method].preferences or not PROTOCOLS[protocol].preferences)
        and (method in everywhere or protocol == TASKS[0])
    ]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    minutes = len(plan) * steps * SECONDS_PER_STEP / 60 / workers
    typer.echo(f"{len(plan)} runs of {steps} steps, {workers} at a time: about {max(1, round(minutes))} minutes.")
    with Progress(*columns, speed_estimate_period=3600) as progress:
        bar = progress.add_task("", total=len(plan))

        def keep(protocol: str, method: str, seed: int, result: dict) -> None:
            path = _path(output_dir, protocol, method, seed, steps)
            write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
            progress.update(bar, advance=1, description=f"{protocol} · {method} · seed {seed}")

        if workers == 1:
            torch.set_num_threads(1)
            for run in plan:
                keep(*run, run_one(*run, steps, output_dir / "scratch"))
        elif plan:
            with ProcessPoolExecutor(workers, get_context("spawn"), _start) as pool:
                runs = {pool.submit(run_one, *run, steps, output_dir / "scratch"): run for run in plan}
                for future in as_completed(runs):
                    keep(*runs[future], future.result())
    shutil.rmtree(output_dir / "scratch", ignore_errors=True)
    write_report(output_dir, steps)


def _start() -> None:
    _quiet()
    torch.set_num_threads(1)


def run_one(protocol: str, method: str, seed: int, steps: int, scratch: Path) -> dict:
    """Train and evaluate one method; its line of the results, with the figures of the aligned model beside."""
    tokenizer, prompts, rule = load_tokenizer(), heldout_prompts(), PROTOCOLS[protocol]
    scratch = scratch / f"{protocol}-{method}-{seed}"
    shutil.rmtree(scratch, ignore_errors=True)
    train = training_rows(rule, seed, steps * 16)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    setting = Setting(scratch, seed, steps, tokenizer, train, rule.preferences, len(rule.tasks) > 1)
    trainer = METHODS[method].make(setting)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    peak = _peak_bytes()
    # A budget is kept in the metric it was set in, which the yardstick need not be.
    budget = getattr(trainer.args, "drift_budget", None)
    kept = None if budget is None else trainer.drift_report().mean_relative_drift <= budget
    if rule.attack:
        attack(trainer, rule.tasks[0], seed)
    test = test_rows(rule)
    expected = test.map(prefixed) if METHODS[method].prefixed else test
    _, run = evaluate(method, seed, trainer.model, tokenizer, prompts, expected, progress=False)
    run.relative_drift = DriftReport.measure(trainer.model, yardstick()).mean_relative_drift
    run.train_seconds = seconds
    shutil.rmtree(scratch, ignore_errors=True)
    line = {"protocol": protocol, "steps": steps, "run": vars(run), "aligned": aligned(protocol)}
    return line | {"budget_kept": kept, "peak_bytes": peak}


@cache
def aligned(protocol: str) -> dict:
    """Figures of the aligned model."""
    test = test_rows(PROTOCOLS[protocol])
    return vars(evaluate("aligned", 0, load_model(), load_tokenizer(), heldout_prompts(), test, progress=False)[1])


@cache
def yardstick() -> FisherStatistics:
    """The same for all: the shipped statistics, whatever the method was trained with."""
    return estimate_fisher(load_model(), alignment_dataset(), load_tokenizer(), progress=False)


def _peak_bytes() -> int:
    """Peak resident memory since `clear_refs` was written (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def _path(folder: Path, protocol: str, method: str, seed: int, steps: int) -> Path:
    return folder / "runs" / f"{protocol}__{method}__{seed}__{steps}.json"


def _choice(given: str | None, default: tuple[str, ...], known: dict, kind: str) -> tuple[str, ...]:
    names = default if given is None else tuple(given.split(","))
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"there is no {kind} '{name}'; known are {', '.join(known)}")
    return names


def _quiet() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


if __name__ == "__main__":
    typer.run(main)
