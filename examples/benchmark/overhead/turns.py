"""Step times of trainers that take turns, step by step, in one process."""

import ctypes
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from agl_trl import AGLDPOConfig, AGLDPOTrainer, AGLSFTConfig, AGLSFTTrainer
from agl_trl.data import select_rows, tokenize_row
from agl_trl.miniworld import alignment_dataset, load_tokenizer

from ..methods import ReplayTrainer
from .peer import PeerTrainer
from .shapes import Shape, lora_of, model_of, rows_of, training_of


# Options of AGL. "TRL" is its own trainer, what everything is relative to; replay and KL are what people would take instead.
ALL = dict(alignment_coef=3.0, collision_coef=0.1)
VARIANTS: dict[str, dict[str, Any]] = {
    "TRL": {},
    "penalty": dict(alignment_coef=3.0),
    "budget (default)": {},
    "two weights": dict(alignment_coef=3.0, task_coef=1.0),
    "all but overlap": dict(alignment_coef=3.0, collision_coef=0.1, collision_alpha=0.0),
    "all with 32 rows of the overlap": ALL | dict(collision_rows=32),
    "all": ALL,
    "anchor every 8": dict(anchor_coef=1.0, anchor_every=8),
    "replay of 1 row": {},
    "KL on as many rows": dict(alignment_coef=0.0, anchor_coef=1.0, anchor_every=1),
    "alignment-risk": {},
}
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of malloc.h
PROTECTED_ROWS = 8  # a few: no step depends on their number
SFT_ONLY = {"replay of 1 row": ReplayTrainer, "alignment-risk": PeerTrainer}


class Baton(TrainerCallback):
    """
    Seconds of every optimizer step of one of several trainers that take turns, step by step: each trains in a thread of its
    own, and only the one whose turn it is runs. What the machine does meanwhile then meets all of them alike.
    """

    def __init__(self, mine: threading.Semaphore, following: threading.Semaphore) -> None:
        self.mine, self.following = mine, following
        self.ready = threading.Event()
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.ready.set()
        self.mine.acquire()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        self.following.release()


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
    if name in ("TRL", *SFT_ONLY):
        plain, config = (DPOTrainer, DPOConfig) if kind == "dpo" else (SFTTrainer, SFTConfig)
        trainer = SFT_ONLY.get(name, plain)(model_of(shape), config(**common), **data)
        if isinstance(trainer, PeerTrainer):
            trainer.prepare(rows.select(range(PROTECTED_ROWS)), shape.length)
        if isinstance(trainer, ReplayTrainer):
            trainer.replay_rows = [
                tokenize_row(r, load_tokenizer(), shape.length) for r in select_rows(rows, PROTECTED_ROWS, 0)
            ]
    else:
        ours, config = (AGLDPOTrainer, AGLDPOConfig) if kind == "dpo" else (AGLSFTTrainer, AGLSFTConfig)
        options = VARIANTS[name] | (dict(anchor_batch_size=shape.batch) if name.startswith("KL") else {})
        args = config(**common, **options, fisher_num_samples=PROTECTED_ROWS, fisher_batch_size=shape.batch)
        trainer = ours(model_of(shape), args, alignment_dataset=rows, **data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def keep_memory() -> None:
    """
    Let all threads allocate from one arena (glibc) that gives nothing back: else each keeps for itself what its trainer's last
    step has freed, or the one whose turn follows pays for pages that were given back and must be asked for again.
    """
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            mallopt(parameter, value)


def step_seconds(names: list[str], shape: Shape, kind: str, steps: int) -> dict[str, list[float]]:
    """Seconds of every step of all variants, taken in turns; the first two of each warm up."""
    keep_memory()
    turns = [threading.Semaphore(0) for _ in names]
    batons = [Baton(mine, following) for mine, following in zip(turns, turns[1:] + turns[:1], strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        trainers = [build(name, shape, kind, steps + 2, f"{folder}/{i}", batons[i]) for i, name in enumerate(names)]
        with ThreadPoolExecutor(len(trainers)) as pool:
            running = []
            for trainer, baton in zip(trainers, batons, strict=True):
                running.append(pool.submit(trainer.train))
                # One at a time gets ready for its first step, where it waits for its turn.
                while not baton.ready.wait(timeout=1):
                    if running[-1].done():
                        running[-1].result()  # raises what has ended it
            turns[0].release()
            for future in running:
                future.result()
    return {name: baton.seconds[2:] for name, baton in zip(names, batons, strict=True)}


def step_ratios(names: list[str], shape: Shape, kind: str, steps: int) -> list[dict[str, Any]]:
    """Per variant the median ratio of step times to TRL's, over steps taken in turns, and its seeded bootstrap interval."""
    seconds = {name: np.array(values) for name, values in step_seconds(names, shape, kind, steps).items()}
    lines = []
    for name, values in seconds.items():
        ratios = values / seconds["TRL"]
        medians = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
        low, high = np.quantile(medians, (0.025, 0.975))
        lines.append(
            {
                "variant": name,
                "ratio of step time": float(np.median(ratios)),
                "low": float(low),
                "high": float(high),
                "ms a step": float(1e3 * np.median(values)),
                "steps": steps,
            }
        )
    return lines
