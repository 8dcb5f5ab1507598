"""What a statistics pass will take, before it starts: memory, size of the file, time."""

import time
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .behaviour import evaluating, input_device
from .lora import layer_shape, linear_layers
from .sketch import EXACT_UP_TO, SKETCH_FACTOR


class FisherPlan(NamedTuple):
    """
    What a statistics pass will take.

    Args:
        layers (`int`):
            Linear layers that are measured.
        inputs (`int`):
            Inputs among them that are different; layers that read the same one share its covariance.
        accumulator_bytes (`int`):
            Memory of the sums, beside the model.
        file_bytes (`int`):
            Size of `agl/fisher.safetensors` without its header.
        seconds_per_token (`float`):
            Time of the trial forward pass.
    """

    layers: int
    inputs: int
    accumulator_bytes: int
    file_bytes: int
    seconds_per_token: float


def covariance_bytes(dim: int, rank: int, bytes_per_number: int = 2) -> tuple[int, int]:
    """Bytes of the sums of one covariance while it is accumulated, and of what is kept of it in the file."""
    exact = dim <= EXACT_UP_TO or SKETCH_FACTOR * rank >= dim
    sums = 4 * dim * (dim if exact else SKETCH_FACTOR * rank) + 4 + 8
    kept = min(rank, dim)
    return sums, bytes_per_number * dim * kept + 4 * kept + 4


def file_and_memory(
    shapes: dict[str, tuple[int, int]], input_of: dict[str, str], rank: int, damping: float
) -> tuple[int, int]:
    """
    Bytes of the sums and of the file, from shapes alone.

    Args:
        shapes (`dict[str, tuple[int, int]]`):
            `(d_out, d_in)` of every layer.
        input_of (`dict[str, str]`):
            For every layer the name of its shared input.
        rank (`int`):
            Eigenpairs per covariance.
        damping (`float`):
            δ; below 1 the output side is measured too.
    """
    dims = [shapes[name][1] for name in sorted(set(input_of.values()))]
    if damping < 1:
        dims += [d_out for d_out, _ in shapes.values()]
    sums, kept = zip(*(covariance_bytes(dim, rank) for dim in dims), strict=True)
    return sum(sums), sum(kept) + 4 * len(shapes) + 8


@torch.no_grad()
def plan_fisher(
    model: PreTrainedModel | PeftModel, *, rank: int, damping: float, batch_size: int, tokens: int = 64
) -> FisherPlan:
    """Plan a statistics pass from one short forward pass, which tells which layers read the same input."""
    layers = linear_layers(model)
    seen: dict[int, tuple[str, torch.Tensor]] = {}
    input_of: dict[str, str] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        input_of[name] = seen.setdefault(id(args[0]), (name, args[0]))[0]

    handles = [module.register_forward_hook(partial(note, name)) for name, module in layers.items()]
    ids = torch.ones(batch_size, tokens, dtype=torch.long, device=input_device(model))
    try:
        with evaluating(model):
            model(input_ids=ids[:1, :2], use_cache=False)  # warm
            input_of.clear()
            seen.clear()
            began = time.monotonic()
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            seconds = time.monotonic() - began
    finally:
        for handle in handles:
            handle.remove()
    shapes = {name: layer_shape(module) for name, module in layers.items() if name in input_of}
    memory, file = file_and_memory(shapes, input_of, rank, damping)
    backward = 1 if damping == 1 else 3
    return FisherPlan(
        len(shapes), len(set(input_of.values())), memory, file, backward * seconds / (batch_size * tokens)
    )
