"""
Fine-tune a real model with every method and seed, and say what each kept and what it cost:

    python -m examples.benchmark.real --model ID --task rows.jsonl --unsafe strongreject.jsonl --safe xstest.jsonl \\
        --methods plain plain-lr0.3 agl replay kl --seeds 0 1 2 --output outputs/real
    python -m examples.benchmark.real --output outputs/real --report

Every run is a process. Its line is in `results.jsonl` as soon as it ends, and a run that is there is not repeated: what was
interrupted goes on where it stopped. The base model is asked once. `results.jsonl` holds figures and counts; answers of the base
model are in `cache`, those of tuned models nowhere.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import HfArgumentParser

from agl_trl.artifacts.files import check_writable, write_atomically

from ..run import quiet
from .methods import chosen_methods
from .report import read, summary, write_report
from .run import BASE, run_one, start_worker
from .setting import Options, load_data


def main(options: Options) -> None:
    """
    Run what is missing, then write the report.

    Raises:
        `ValueError`: If an option or a file has no meaning, or the folder holds runs of other settings.
        `OSError`: If the folder can't be written.
        `RuntimeError`: If the process of a run ends before the run.
    """
    quiet()
    if not options.report:
        run_missing(options)
    Console().print(f"Report: {write_report(options)}")


def run_missing(options: Options) -> None:
    load_data(options)  # told now, not by the first run
    plan: list[tuple[str, int | None]] = [(BASE, None)]
    plan += [(method, seed) for seed in options.seeds for method in chosen_methods(options)]
    check_writable(options.output)
    lines = read(options)
    if lines and (differing := differences(lines[0]["settings"], options.settings())):
        raise ValueError(f"'{options.output}' holds runs with other settings ({differing}): name another folder.")
    done = {(line["method"], line["seed"]) for line in lines}
    plan = [run for run in plan if run not in done]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = get_context("forkserver")
    context.set_forkserver_preload(["examples.benchmark.real.run"])  # imported once, for all processes
    # A process for every run: memory that another run has left behind would count as its own.
    with (
        Progress(*columns) as progress,
        ProcessPoolExecutor(1, context, start_worker, max_tasks_per_child=1) as pool,
    ):
        bar = progress.add_task("", total=len(plan))
        for method, seed in plan:
            name = method if seed is None else f"{method}, seed {seed}"
            progress.update(bar, description=name)
            try:
                line = pool.submit(run_one, options, method, seed).result()
            except BrokenProcessPool as error:
                raise RuntimeError(
                    f"The process of the run '{name}' was ended, perhaps for want of memory."
                ) from error
            lines.append(line)
            write_atomically(options.results, "".join(json.dumps(line) + "\n" for line in lines).encode())
            progress.console.print(f"{name}: {summary(line)}", highlight=False)
            progress.advance(bar)


def differences(there: dict, here: dict) -> str:
    return ", ".join(f"{key}: {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key])


if __name__ == "__main__":
    (options,) = HfArgumentParser(Options, description=__doc__.splitlines()[1]).parse_args_into_dataclasses()
    try:
        main(options)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(str(error))
