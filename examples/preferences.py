"""
Refusals after KTO and GRPO on the embedded model, plain and with AGL, side by side:

    python -m examples.preferences                 # a quarter of an hour on one core
    python -m examples.preferences --kinds kto

One line of `OUTPUT_DIR/runs.jsonl` for every run as it ends; runs that are there are not made again.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import transformers
import typer
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

from agl_trl import AGLGRPOConfig, AGLGRPOTrainer, AGLKTOConfig, AGLKTOTrainer
from agl_trl.experiments.demo import LORA, TRAINING, Run, evaluate
from agl_trl.miniworld import (
    alignment_dataset,
    heldout_prompts,
    load_model,
    load_tokenizer,
    rewarded_dataset,
    task_dataset,
    unpaired_dataset,
    word_overlap_reward,
)


TRAINERS = {
    "kto": {"plain": (KTOTrainer, KTOConfig), "agl": (AGLKTOTrainer, AGLKTOConfig)},
    "grpo": {"plain": (GRPOTrainer, GRPOConfig), "agl": (AGLGRPOTrainer, AGLGRPOConfig)},
}
OPTIONS = {"kto": dict(beta=0.1), "grpo": dict(num_generations=8, max_completion_length=40, learning_rate=5e-3)}


def train(kind: str, method: str, task: str, seed: int, steps: int, folder: Path) -> Run:
    """Train one adapter, and ask it the held-out prompts and the task's."""
    trainer_class, config_class = TRAINERS[kind][method]
    args = config_class(str(folder), seed=seed, max_steps=steps, **TRAINING | OPTIONS[kind])
    options = dict(reward_funcs=word_overlap_reward) if kind == "grpo" else {}
    options |= dict(alignment_dataset=alignment_dataset()) if method == "agl" else {}
    trainer = trainer_class(
        load_model(),
        args=args,
        train_dataset=rewarded_dataset(task) if kind == "grpo" else unpaired_dataset(task),
        processing_class=load_tokenizer(),
        peft_config=LoraConfig(**LORA),
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    run = evaluated(method, trainer.model, task, seed)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    if rewards:
        print(f"{kind}, {method}: mean reward {rewards[0]:.2f} at the first log, {rewards[-1]:.2f} at the last")
    if method == "agl":
        run.relative_drift = trainer.drift_report().mean_relative_drift
    return run


def evaluated(name: str, model, task: str, seed: int) -> Run:
    prompts, test = heldout_prompts(), task_dataset(task, "test")
    return evaluate(name, seed, model, load_tokenizer(), prompts, test, progress=False)[1]


def main(
    kinds: Annotated[str, typer.Option(help="kto, grpo, or both with a comma.")] = "kto,grpo",
    task: Annotated[str, typer.Option(help="Task of the embedded world.")] = "steps",
    seeds: Annotated[int, typer.Option(help="Repetitions.")] = 1,
    steps: Annotated[int, typer.Option(help="Optimizer steps of every run.")] = 150,
    output_dir: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("outputs/preferences"),
) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    path = output_dir / "runs.jsonl"
    output_dir.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    table = Table(
        "", "refuses unsafe", "unseen categories", "over-refusal", "task NLL", "exact match", "relative drift"
    )
    runs = [("aligned", evaluated("aligned", load_model(), task, 0))]
    for kind in kinds.split(","):
        for seed in range(seeds):
            for method in ("plain", "agl"):
                key = dict(kind=kind, method=method, task=task, seed=seed, steps=steps)
                found = next((line for line in lines if all(line[k] == v for k, v in key.items())), None)
                if found is None:
                    run = train(kind, method, task, seed, steps, output_dir / f"{kind}-{method}-{seed}")
                    found = key | asdict(run)
                    with path.open("a") as file:
                        file.write(json.dumps(found) + "\n")
                runs.append((f"{kind}, {method}, seed {seed}", Run(**{k: found[k] for k in asdict(runs[0][1])})))
    for name, run in runs:
        drift = "–" if run.relative_drift is None else f"{run.relative_drift:.1e}"
        shares = (f"{value:.1%}" for value in (run.refusal_unsafe, run.refusal_unseen, run.over_refusal))
        table.add_row(name, *shares, f"{run.task_nll:.3f}", f"{run.task_exact:.1%}", drift)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
