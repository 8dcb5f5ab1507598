"""Peak memory of one trainer or one Fisher pass, each measured in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model

from agl_trl import estimate_fisher
from agl_trl.miniworld import load_tokenizer

from ..run import quiet, reset_peak, resident
from .peer import PEERS, peer_fisher, peer_parameters
from .shapes import SHAPES, lora_of, model_of, rows_of
from .turns import build


# glibc maps every larger block by itself and returns it when it is freed: the resident memory is the memory in use, and not
# what the allocator happens to keep, which differs by several per cent from one run of the same trainer to the next.
IN_USE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
PASSES = {"Fisher, δ = 1": 1.0, "Fisher, δ = 0.1": 0.1}


def apart(name: str, shape: str, kind: str, size: int) -> dict[str, float]:
    """What [`main`] prints, from a fresh process."""
    command = [sys.executable, "-m", "examples.benchmark.overhead.memory", name, shape, kind, str(size)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | IN_USE)
    if done.returncode:
        raise SystemExit(f"'{name}' failed: {(done.stderr.strip().splitlines() or ['it was killed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(name: str, shape: str, kind: str, size: Annotated[int, typer.Argument(help="Steps or rows.")]) -> None:
    """Print the peak, what of it came on top of the loaded model, and the seconds, of a variant or a Fisher pass."""
    quiet()
    rule = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        if name in PASSES or name in PEERS:
            model = get_peft_model(model_of(rule), LoraConfig(**lora_of(rule)))
            rows = rows_of(rule, rows=size)
            job = lambda: fisher_pass(name, model, rows, rule.length, rule.batch)  # noqa: E731
        else:
            job = build(name, rule, kind, size, folder).train
        before = _reset(rule.accelerator)
        start = time.perf_counter()
        job()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if rule.accelerator else resident("VmHWM")
    print(json.dumps({"peak": peak, "extra": peak - before, "seconds": seconds}))


def fisher_pass(name: str, model, rows, length: int, batch: int) -> Any:
    """Statistics of the rows, with ours or with `alignment-risk`."""
    if name in PEERS:
        return peer_fisher(model, rows, length, peer_parameters(name, model))
    options = dict(shrinkage=PASSES[name], num_samples=None, batch_size=batch, max_length=length, progress=False)
    return estimate_fisher(model, rows, load_tokenizer(), **options)


def _reset(accelerator: bool) -> int:
    """Start the peak from here on; returns the memory held now."""
    if accelerator:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    reset_peak()
    return resident("VmRSS")


if __name__ == "__main__":
    typer.run(main)
