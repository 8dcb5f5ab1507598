"""
Time of a training step with AGL relative to TRL's own, in one process, interleaved:

    python -m examples.benchmark.overhead                # embedded model
    python -m examples.benchmark.overhead --shape 135m   # random weights of a 135 M Llama shape, 2,048 tokens a step
"""

import itertools
import statistics as stats
import tempfile
import time
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from agl_trl import AGLSFTConfig, AGLSFTTrainer
from agl_trl.demo import TRAINING
from agl_trl.miniworld import alignment_dataset, load_model, load_tokenizer, task_dataset

from .__main__ import _quiet


class Shape(StrEnum):
    embedded = "embedded"
    m135 = "135m"


# None is TRL's SFTTrainer, what everything is relative to.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "TRL": None,
    "complete form (default)": {},
    "budget": dict(alignment_coef=0.0, drift_budget=1e-3),
    "two weights": dict(task_coef=1.0),
    "all but overlap": dict(collision_coef=0.1, collision_alpha=0.0),
    "all, 32 rows of the overlap": dict(collision_coef=0.1, collision_rows=32),
    "all": dict(collision_coef=0.1),
    "anchor every 8": dict(anchor_coef=1.0, anchor_every=8),
}


class _StepTimes(TrainerCallback):
    """Seconds of every optimizer step, without the logging around it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def model_of(shape: Shape) -> PreTrainedModel:
    if shape == Shape.embedded:
        return load_model()
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )


def rows_of(shape: Shape) -> Dataset:
    """Training rows of the embedded task, or of 512 random tokens."""
    if shape == Shape.embedded:
        return task_dataset("extract")
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_list(
        [{"input_ids": torch.randint(5, 49152, (512,), generator=generator).tolist()} for _ in range(64)]
    )


def step_seconds(variant: str, shape: Shape, steps: int) -> float:
    """Median seconds of a step of one variant, of a fresh run; the first two steps warm up."""
    options = VARIANTS[variant]
    times = _StepTimes()
    batch = dict(per_device_train_batch_size=4) if shape == Shape.m135 else {}
    lora = LoraConfig(r=16 if shape == Shape.m135 else 8, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as folder:
        common = dict(
            output_dir=folder, max_steps=steps + 2, **{**TRAINING, **batch, "logging_steps": 1000, "warmup_steps": 1}
        )
        data = dict(
            train_dataset=rows_of(shape), processing_class=load_tokenizer(), peft_config=lora, callbacks=[times]
        )
        if options is None:
            trainer = SFTTrainer(model_of(shape), SFTConfig(**common), **data)
        else:
            args = AGLSFTConfig(**common, **options)
            trainer = AGLSFTTrainer(model_of(shape), args, alignment_dataset=alignment_dataset(), **data)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return stats.median(times.seconds[2:])


def main(
    shape: Annotated[Shape, typer.Option()] = Shape.embedded,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps per variant and round.")] = 30,
) -> None:
    """Print the ratio of step times, median and range over rounds."""
    _quiet()
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _, variant in itertools.product(range(rounds), VARIANTS):
        seconds[variant].append(step_seconds(variant, shape, steps))
    table = Table(
        "variant",
        "ratio of step time",
        "range over rounds",
        title=f"{shape.value}: TRL {1e3 * stats.median(seconds['TRL']):.0f} ms a step",
    )
    for variant, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds["TRL"], strict=True)]
        table.add_row(variant, f"{stats.median(ratios):.3f}", f"{min(ratios):.3f} to {max(ratios):.3f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
