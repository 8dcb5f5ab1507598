"""One run, in a process of its own: train one method with one seed, and measure it."""

import os
import tempfile
import threading
import time
from multiprocessing import connection, parent_process
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from agl_trl import AGLSFTTrainer, DriftReport
from agl_trl.artifacts.files import write_atomically

from ..run import quiet, reset_peak, resident
from .base import ask_base, yardstick
from .measure import finite, measure
from .methods import make
from .setting import Options, load, load_data, training_rows


BASE = "base"  # stands for a method in the results


def start_worker() -> None:
    """No noise, and no life after the command: an orphan would go on for the rest of its run."""
    quiet()
    parent = parent_process()
    assert parent is not None, "started by the command"

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class StepTimes(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def run_one(options: Options, method: str, seed: int | None) -> dict[str, Any]:
    """
    Train and measure one method, or measure the base model.

    Returns:
        `dict`: the line of the results: figures and counts, no answer.
    """
    data = load_data(options)
    model, tokenizer = load(options)
    base = ask_base(model, tokenizer, data, options)
    line: dict[str, Any] = {"method": method, "seed": seed}
    if method == BASE:
        line["settings"] = options.settings()
    else:
        assert seed is not None
        with tempfile.TemporaryDirectory() as folder:
            rows = training_rows(data, options, seed)
            trainer = make(method, model, tokenizer, rows, base, options, seed, Path(folder))
            times = StepTimes()
            trainer.add_callback(times)
            start_peak()
            start = time.perf_counter()
            trainer.train()
            line["train_seconds"] = round(time.perf_counter() - start, 2)
            line["seconds_per_step"] = round(median(times.seconds), 4)
            line["peak_bytes"] = peak()
        model = trainer.model
        if isinstance(trainer, AGLSFTTrainer):
            protected = trainer.drift_report().metadata.get("protected") or {}
            line["scale"] = protected.get("scale")  # of the update, where the KL budget shrank it at the end
        line["relative_drift"] = finite(DriftReport.measure(model, yardstick(base)).mean_relative_drift)
    figures, verdicts = measure(model, tokenizer, data, base, options)
    bits = "".join(f"{name} {text}\n" for name, text in verdicts.items())
    write_atomically(verdict_file(options, method, seed), bits.encode())
    return line | figures


def verdict_file(options: Options, method: str, seed: int | None) -> Path:
    """Where the verdict on every prompt is kept, for paired tests."""
    return options.cache / "verdicts" / f"{method}-{seed}.txt"


def start_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()


def peak() -> int:
    """Most bytes since [`start_peak`]: of the GPU, or the resident memory of the process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")
