"""
Time of a training step with AGL relative to TRL's own, in one process, the trainers taking turns step by step:

    python -m examples.benchmark.overhead                # embedded model
    python -m examples.benchmark.overhead --shape 135m   # random weights of a 135 M Llama shape, 2,048 tokens a step
"""

import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from typing import Annotated, Any

import numpy as np
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

from .run import quiet


class Shape(StrEnum):
    embedded = "embedded"
    m135 = "135m"


# None is TRL's SFTTrainer, what everything is relative to.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "TRL": None,
    "penalty": dict(alignment_coef=3.0),
    "budget (default)": {},
    "two weights": dict(alignment_coef=3.0, task_coef=1.0),
    "all but overlap": dict(alignment_coef=3.0, collision_coef=0.1, collision_alpha=0.0),
    "all with 32 rows of the overlap": dict(alignment_coef=3.0, collision_coef=0.1, collision_rows=32),
    "all": dict(alignment_coef=3.0, collision_coef=0.1),
    "anchor every 8": dict(anchor_coef=1.0, anchor_every=8),
}


class _Baton(TrainerCallback):
    """
    Seconds of every optimizer step of one of several trainers that take turns, step by step: each trains in a thread of its
    own, and only the one whose turn it is runs. What the machine does meanwhile then meets all of them alike.
    """

    def __init__(self, mine: threading.Semaphore, following: threading.Semaphore) -> None:
        self.mine, self.following = mine, following
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.mine.acquire()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)
        self.following.release()


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


def build(options: dict[str, Any] | None, shape: Shape, steps: int, folder: str, baton: _Baton) -> SFTTrainer:
    """Trainer of one variant."""
    batch = dict(per_device_train_batch_size=4) if shape == Shape.m135 else {}
    common = dict(
        output_dir=folder,
        max_steps=steps,
        **{**TRAINING, **batch, "logging_steps": 1000, "warmup_steps": 1, "save_strategy": "no"},
    )
    data = dict(
        train_dataset=rows_of(shape),
        processing_class=load_tokenizer(),
        peft_config=LoraConfig(r=16 if shape == Shape.m135 else 8, target_modules="all-linear"),
        callbacks=[baton],
    )
    if options is None:
        trainer = SFTTrainer(model_of(shape), SFTConfig(**common), **data)
    else:
        args = AGLSFTConfig(**common, **options)
        trainer = AGLSFTTrainer(model_of(shape), args, alignment_dataset=alignment_dataset(), **data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def step_seconds(variants: dict[str, dict[str, Any] | None], shape: Shape, steps: int) -> dict[str, list[float]]:
    """Seconds of every step of all variants, taken in turns; the first two of each warm up."""
    turns = [threading.Semaphore(0) for _ in variants]
    batons = [_Baton(mine, following) for mine, following in zip(turns, turns[1:] + turns[:1], strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        trainers = [
            build(options, shape, steps + 2, f"{folder}/{i}", batons[i]) for i, options in enumerate(variants.values())
        ]
        with ThreadPoolExecutor(len(trainers)) as pool:
            # All get ready at once; at the first step each waits for its turn.
            running = [pool.submit(trainer.train) for trainer in trainers]
            turns[0].release()
            for future in running:
                future.result()
    return {variant: baton.seconds[2:] for variant, baton in zip(variants, batons, strict=True)}


def main(
    shape: Annotated[Shape, typer.Option()] = Shape.embedded,
    steps: Annotated[int, typer.Option(min=2, help="Timed steps of every variant.")] = 200,
    only: Annotated[str | None, typer.Option(help=f"Comma-separated, of: {', '.join(list(VARIANTS)[1:])}.")] = None,
) -> None:
    """Print the ratio of step times: median over steps taken in turns, and its seeded bootstrap interval."""
    quiet()
    chosen = {name: VARIANTS[name] for name in (VARIANTS if only is None else ("TRL", *only.split(",")))}
    seconds = {variant: np.array(values) for variant, values in step_seconds(chosen, shape, steps).items()}
    table = Table(
        "variant",
        "ratio of step time",
        "95 % interval",
        title=f"{shape.value}: TRL {1e3 * np.median(seconds['TRL']):.0f} ms a step, {steps} steps each in turns",
    )
    for variant, values in seconds.items():
        ratios = values / seconds["TRL"]
        medians = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
        low, high = np.quantile(medians, (0.025, 0.975))
        table.add_row(variant, f"{np.median(ratios):.3f}", f"{low:.3f} to {high:.3f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
