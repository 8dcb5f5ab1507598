"""The runs of `agl-trl scaling` without a file: embedded models of three sizes, fine-tuned for longer and longer."""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from ..artifacts.files import write_atomically
from ..miniworld import CheckpointName, alignment_dataset, heldout_unsafe, load_model, load_tokenizer, task_dataset
from ..modeling.likelihood import answer_nll
from ..trainer.sft import AGLSFTTrainer
from ..trainer.trl_config import AGLSFTConfig
from .demo import LORA, TRAINING


METHODS = ("lora", "agl")
SIZES: tuple[CheckpointName, ...] = ("aligned-small", "aligned-medium", "aligned")
STEPS = (50, 100, 200, 400)
TASK = "extract"
RUNS_FILE = "runs.jsonl"
PROBE_STEPS = 10
SECONDS_AROUND = 4  # of a run: loading, statistics and two evaluations


class Planned(NamedTuple):
    """A run: its method, the embedded checkpoint it starts from, its optimizer steps and its seed."""

    method: str
    size: CheckpointName
    steps: int
    seed: int


def sweep(
    output_dir: Path,
    seeds: int,
    *,
    sizes: Sequence[CheckpointName] = SIZES,
    steps: Sequence[int] = STEPS,
    console: Console,
) -> Path:
    """
    Fine-tune every size for every number of steps, plain and with AGL's defaults, and return the file of runs.

    A run has a learning-rate schedule of its own, to its end. `finetune_tokens` counts all tokens of the rows seen, padding
    excepted; the losses are the mean NLL per token, in nats, of reference refusals to held-out unsafe prompts, before and after.

    The file is written anew after every run, whole: what it holds already is not repeated.

    Args:
        output_dir (`Path`):
            Folder of `runs.jsonl`.
        seeds (`int`):
            Seeds 0, 1, ... of every combination.
        sizes (`Sequence[str]`, *optional*):
            Embedded checkpoints.
        steps (`Sequence[int]`, *optional*):
            Optimizer steps.
        console (`Console`):
            For the plan and the progress bar.

    Raises:
        `ValueError`: If the file is there and holds something else than runs of this command.
        `OSError`: If the file can't be written.
    """
    path = output_dir / RUNS_FILE
    rows = _finished(path)
    done = {Planned(*(row[name] for name in Planned._fields)) for row in rows}
    # Seeds outermost: an interrupted sweep has few gaps.
    wanted = [Planned(m, size, n, seed) for seed in range(seeds) for size in sizes for n in steps for m in METHODS]
    plan = [run for run in wanted if run not in done]
    _write(path, rows)  # told now if the folder can't be written
    told = f"{len(wanted)} runs, {len(wanted) - len(plan)} of them done"
    if plan:
        seconds = {size: _seconds_per_step(size) for size in dict.fromkeys(run.size for run in plan)}
        minutes = sum(SECONDS_AROUND + run.steps * seconds[run.size] for run in plan) / 60
        told += f"; the rest takes about {max(1, round(minutes))} minutes. It goes on where it stopped if interrupted"
    console.print(f"{told}.", highlight=False)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=console, speed_estimate_period=3600) as progress:
        bar = progress.add_task("", total=sum(run.steps for run in plan))
        for run in plan:
            progress.update(bar, description=f"{run.method}, {run.size}, {run.steps} steps, seed {run.seed}")
            rows.append(run._asdict() | train(run))
            _write(path, rows)
            progress.advance(bar, run.steps)
    return path


def train(run: Planned) -> dict[str, Any]:
    """Train one run; its columns of the file."""
    model, tokenizer, heldout = load_model(run.size), load_tokenizer(), heldout_unsafe()
    n_params = model.num_parameters()
    before = answer_nll(model, tokenizer, heldout, batch_size=64).mean().item()
    with tempfile.TemporaryDirectory() as folder:
        trainer_class, config_class, data = (
            (AGLSFTTrainer, AGLSFTConfig, {"alignment_dataset": alignment_dataset()})
            if run.method == "agl"
            else (SFTTrainer, SFTConfig, {})
        )
        settings: dict[str, Any] = TRAINING | {"include_num_input_tokens_seen": "non_padding"}
        trainer = trainer_class(
            model=model,
            args=config_class(folder, seed=run.seed, max_steps=run.steps, **settings),
            train_dataset=task_dataset(TASK),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
            **data,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {
        "n_params": n_params,
        "finetune_tokens": trainer.state.num_input_tokens_seen,
        "loss_before": before,
        "loss_after": answer_nll(trainer.model, tokenizer, heldout, batch_size=64).mean().item(),
    }


def _seconds_per_step(size: CheckpointName) -> float:
    """From two short runs, whose difference is without what a run costs before its first step and after its last."""
    seconds = []
    for steps in (1, 1 + PROBE_STEPS):
        start = time.perf_counter()
        train(Planned("agl", size, steps, 0))
        seconds.append(time.perf_counter() - start)
    return max(seconds[1] - seconds[0], 0.01) / PROBE_STEPS


def _finished(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            Planned(*(row[name] for name in Planned._fields))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{path}' holds no runs of this command: fit it with --runs, or give another folder."
        ) from error
    return rows


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
