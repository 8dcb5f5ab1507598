"""The Fisher pass relative to an SFT epoch over the same rows, and beside it those of `alignment-risk`."""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from agl_trl.miniworld import load_tokenizer

from .memory import PASSES, apart, fisher_pass
from .peer import PEERS, installed, peer_bytes
from .shapes import SHAPES, Shape, lora_of, model_of, rows_of, training_of


def epoch_seconds(shape: Shape, rows) -> float:
    """Seconds of one epoch of TRL's trainer."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model_of(shape),
            SFTConfig(folder, num_train_epochs=1, **training_of(shape)),
            train_dataset=rows,
            processing_class=load_tokenizer(),
            peft_config=LoraConfig(**lora_of(shape)),
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        if shape.accelerator:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def pass_ratios(name: str, size: int, rounds: int) -> list[dict[str, Any]]:
    """Per pass the median and range of its time relative to an epoch, taken in turns, its memory, and the size of its file."""
    shape = SHAPES[name]
    rows = rows_of(shape, rows=size)
    epochs: list[float] = []
    seconds: dict[str, list[float]] = {label: [] for label in PASSES}
    bytes_on_disk: dict[str, int] = {}
    for number in range(rounds + 1):  # the first warms up
        epochs.append(epoch_seconds(shape, rows))
        model = get_peft_model(model_of(shape), LoraConfig(**lora_of(shape)))
        for label in PASSES:
            start = time.perf_counter()
            statistics = fisher_pass(label, model, rows, shape.length, shape.batch)
            seconds[label].append(time.perf_counter() - start)
            if number == 0:
                bytes_on_disk[label] = saved_bytes(statistics)
        del model
    lines = []
    for label, values in seconds.items():
        ratios = [value / epoch for value, epoch in zip(values[1:], epochs[1:], strict=True)]
        held = apart(label, name, "sft", size)
        lines.append(
            {
                "pass": label,
                "ratio to an epoch": median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "seconds": median(values[1:]),
                "extra MB": held["extra"] / 1e6,
                "file MB": bytes_on_disk[label] / 1e6,
            }
        )
    return lines + [{"pass": peer, **peer_ratios(peer, name, size, median(epochs[1:]))} for peer in PEERS]


def peer_ratios(peer: str, name: str, size: int, epoch: float) -> dict[str, Any]:
    """What the peer took, or why there is no figure."""
    if not installed():
        return {"seconds": "not installed"}
    needed = peer_bytes(peer, SHAPES[name], size)
    if needed > psutil.virtual_memory().available:
        return {"seconds": "does not fit", "extra MB": f"more than {needed / 1e6:,.0f}"}
    held = apart(peer, name, "sft", size)
    return {"ratio to an epoch": held["seconds"] / epoch, "seconds": held["seconds"], "extra MB": held["extra"] / 1e6}


def saved_bytes(statistics) -> int:
    """Size of the statistics as a file."""
    with tempfile.TemporaryDirectory() as folder:
        statistics.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
