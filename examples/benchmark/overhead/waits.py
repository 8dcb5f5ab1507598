"""How often a step waits for the device: calls after which the CPU needs a number that the device has yet to compute."""

import tempfile
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .shapes import Shape
from .turns import build


# What reads a value back, on any device, and what CUDA itself calls waiting.
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize", "cudaDeviceSynchronize")
STEPS = (2, 4)


def waits(name: str, shape: Shape, kind: str, steps: int) -> dict[str, int]:
    """Calls in a whole run of some steps, by name."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if shape.accelerator else [])
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(name, shape, kind, steps, folder)
        with profile(activities=activities) as profiler:
            trainer.train()
            if shape.accelerator:
                torch.cuda.synchronize()
    counts = {event.key: event.count for event in profiler.key_averages()}
    return {wait: counts.get(wait, 0) for wait in WAITS}


def waits_per_step(names: list[str], shape: Shape, kind: str) -> list[dict[str, Any]]:
    """Per variant the calls of a step: what a longer run has more than a shorter one, by the steps it has more."""
    lines = []
    for name in names:
        short, long = (waits(name, shape, kind, steps) for steps in STEPS)
        per_step = {wait: (long[wait] - short[wait]) / (STEPS[1] - STEPS[0]) for wait in WAITS}
        lines.append({"variant": name, **{wait.removeprefix("aten::"): per_step[wait] for wait in WAITS}})
    return lines
