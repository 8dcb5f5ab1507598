"""Step times of trainers that take turns, step by step, in one process."""

import ctypes
import sys
import tempfile
import time
from statistics import median
from typing import Any

import numpy as np
import torch
from greenlet import getcurrent, greenlet
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from agl_trl import AGLDPOConfig, AGLDPOTrainer, AGLSFTConfig, AGLSFTTrainer
from agl_trl.data.alignment import select_rows, tokenize_row
from agl_trl.miniworld import alignment_dataset, load_tokenizer
from agl_trl.trainer.gradients import add_gradients
from agl_trl.trainer.regularizer import Regularizer

from ..baselines import ReplayTrainer
from .peer import PeerTrainer
from .shapes import Shape, lora_of, model_of, rows_of, training_of


# Options of AGL. "TRL" is its own trainer, what everything is relative to, and "TRL again" the same once more: how far it is
# from 1 is the error of the measurement. Replay and KL are what people would take instead.
ALL = dict(alignment_coef=3.0, collision_coef=0.1)
VARIANTS: dict[str, dict[str, Any]] = {
    "TRL": {},
    "TRL again": {},
    "penalty": dict(alignment_coef=3.0),
    "KL budget (default)": {},
    "drift budget": dict(drift_budget=3e-3),
    "two weights": dict(alignment_coef=3.0, task_coef=1.0),
    "all but overlap": dict(alignment_coef=3.0, collision_coef=0.1, collision_alpha=0.0),
    "all with 32 rows of the overlap": ALL | dict(collision_rows=32),
    "all": ALL,
    "anchor every 8": dict(anchor_coef=1.0, anchor_every=8),
    "replay of 1 row": {},
    "KL on as many rows": dict(alignment_coef=0.0, anchor_coef=1.0, anchor_every=1),
    "alignment-risk": {},
}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
CYCLE = 8  # steps after which every variant does the same again
PROTECTED_ROWS = 8  # a few: no step depends on their number
SFT_ONLY = {"replay of 1 row": ReplayTrainer, "alignment-risk": PeerTrainer}


class Turn(TrainerCallback):
    """
    Seconds of every optimizer step of one of several trainers that take turns, step by step: each trains in a greenlet of its
    own and hands over before every step, to its parent. All run in one thread, with its one team of CPU threads, and what the
    machine does meanwhile meets all of them alike.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        getcurrent().parent.switch()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def build(name: str, shape: Shape, kind: str, steps: int, folder: str, *callbacks: TrainerCallback) -> SFTTrainer:
    """Trainer of one variant; its alignment rows have as many tokens as its training rows."""
    common = dict(output_dir=folder, max_steps=steps, **training_of(shape))
    data = dict(
        train_dataset=rows_of(shape, kind),
        processing_class=load_tokenizer(),
        peft_config=LoraConfig(**lora_of(shape)),
        callbacks=list(callbacks),
    )
    rows = alignment_dataset() if shape.config is None else rows_of(shape)
    if name in ("TRL", "TRL again", *SFT_ONLY):
        plain, config = (DPOTrainer, DPOConfig) if kind == "dpo" else (SFTTrainer, SFTConfig)
        trainer = SFT_ONLY.get(name, plain)(model_of(shape), args=config(**common), **data)
        if isinstance(trainer, PeerTrainer):
            trainer.prepare(rows.select(range(PROTECTED_ROWS)), shape.length)
        if isinstance(trainer, ReplayTrainer):
            trainer.replay_rows = [
                tokenize_row(r, load_tokenizer(), shape.length) for r in select_rows(rows, PROTECTED_ROWS, 0)
            ]
    else:
        ours, config = (AGLDPOTrainer, AGLDPOConfig) if kind == "dpo" else (AGLSFTTrainer, AGLSFTConfig)
        options = VARIANTS[name] | (dict(anchor_batch_size=shape.batch) if name == "KL on as many rows" else {})
        args = config(**common, **options, fisher_num_samples=PROTECTED_ROWS, fisher_batch_size=shape.batch)
        trainer = ours(model_of(shape), args=args, alignment_dataset=rows, **data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def keep_memory() -> None:
    """Let malloc (glibc) give nothing back: else every step pays for pages that the step before has returned."""
    if sys.platform == "linux":
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            ctypes.CDLL(None).mallopt(parameter, value)


def work_seconds(regularizer: Regularizer, repeats: int) -> float:
    """Median seconds of what AGL does at a step beside the model: the gradient of the terms, and holding the budget."""
    parameters = regularizer.parameters
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    seconds = []
    for step in range(repeats + 1):
        start = time.perf_counter()
        add_gradients(parameters, regularizer.gradients(step)[1])
        regularizer.hold()
        if parameters[0].is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def step_seconds(
    names: list[str], shape: Shape, kind: str, steps: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """
    Seconds of every step of all variants, taken in turns, each round begun by another one; the first two warm up. And of
    AGL's variants the seconds of their own work at a step, at the weights they end at.
    """
    keep_memory()
    turns = [Turn() for _ in names]
    with tempfile.TemporaryDirectory() as folder:
        trainers = [
            build(name, shape, kind, steps + 2, f"{folder}/{i}", turn)
            for i, (name, turn) in enumerate(zip(names, turns, strict=True))
        ]
        running = [greenlet(trainer.train) for trainer in trainers]
        for number in tqdm(range(-1, steps + 2), unit="round"):  # up to the first step, then step by step
            first = number % len(running)
            for run in running[first:] + running[:first]:
                run.switch()
    work = {
        name: work_seconds(trainer.align_guard.regularizer, repeats=20)
        for name, trainer in zip(names, trainers, strict=True)
        if isinstance(trainer, AGLSFTTrainer | AGLDPOTrainer)
    }
    return {name: turn.seconds[2:] for name, turn in zip(names, turns, strict=True)}, work


def mean_ratio(ratios: np.ndarray) -> np.ndarray:
    """
    Mean over the steps of a cycle of the median ratio at each, over the last axis but one, of shape `(..., cycles, steps)`. A median
    over all steps would not see what is done at every eighth, and take either kind for all where it is done at every second.
    """
    return np.median(ratios, axis=-2).mean(-1)


def step_ratios(names: list[str], shape: Shape, kind: str, steps: int) -> list[dict[str, Any]]:
    """
    Per variant the ratio of step times to TRL's ([`mean_ratio`] over steps taken in turns), and its seeded bootstrap interval over
    cycles; and AGL's own work, timed alone, relative to TRL's median step.
    """
    taken, work = step_seconds(names, shape, kind, steps)
    seconds = {name: np.array(values) for name, values in taken.items()}
    cycle = min(CYCLE, steps)
    lines = []
    for name, values in seconds.items():
        ratios = (values / seconds["TRL"])[: steps // cycle * cycle].reshape(-1, cycle)
        drawn = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
        low, high = np.quantile(mean_ratio(ratios[drawn]), (0.025, 0.975))
        lines.append(
            {
                "variant": name,
                "ratio of step time": float(mean_ratio(ratios)),
                "low": float(low),
                "high": float(high),
                "ms a step": float(1e3 * mean_ratio(values[: ratios.size].reshape(ratios.shape))),
                "steps": steps,
            }
            | ({"own work": work[name] / float(np.median(seconds["TRL"]))} if name in work else {})
        )
    return lines
