"""What a statistics pass will take, before it starts: memory, size of the file, time."""

import time
from collections import defaultdict
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.alignment import AlignmentRow, batches, pad_token_id
from ..modeling.forward import evaluating, input_device
from ..modeling.lora import layer_shape, linear_layers
from ..objective.covariance import EXACT_UP_TO, SKETCH_FACTOR
from .collector import Collector
from .estimate import FisherType, run_batch


TRIAL_TOKENS = 2


class FisherCost(NamedTuple):
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
    """

    layers: int
    inputs: int
    accumulator_bytes: int
    file_bytes: int


def covariance_bytes(dim: int, rank: int, bytes_per_number: int = 2) -> tuple[int, int]:
    """Bytes of the sums of one covariance while it is accumulated, and of what is kept of it in the file."""
    exact = dim <= EXACT_UP_TO or SKETCH_FACTOR * rank >= dim
    sums = 4 * dim * (dim if exact else SKETCH_FACTOR * rank) + 4 + 8
    kept = min(rank, dim)
    return sums, bytes_per_number * dim * kept + 4 * kept + 4


def file_and_memory(
    shapes: dict[str, tuple[int, int]], input_of: dict[str, str], *, rank: int, shrinkage: float
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
        shrinkage (`float`):
            δ; below 1 the output side is measured too.
    """
    dims = [shapes[name][1] for name in sorted(set(input_of.values()))]
    if shrinkage < 1:
        dims += [d_out for d_out, _ in shapes.values()]
    sums, kept = zip(*(covariance_bytes(dim, rank) for dim in dims), strict=True)
    return sum(sums), sum(kept) + 4 * len(shapes) + 8


@torch.no_grad()
def fisher_cost(model: PreTrainedModel | PeftModel, *, rank: int, shrinkage: float) -> FisherCost:
    """
    Plan a statistics pass from a forward pass of two tokens, which tells which layers read the same input.

    Raises:
        `ValueError`: If no linear layer takes part in it.
    """
    layers = linear_layers(model)
    seen: dict[int, tuple[str, torch.Tensor]] = {}
    input_of: dict[str, str] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args[0].shape[:-1].numel() == TRIAL_TOKENS:  # experts see some of the tokens, and are not measured
            input_of[name] = seen.setdefault(id(args[0]), (name, args[0]))[0]

    handles = [module.register_forward_hook(partial(note, name)) for name, module in layers.items()]
    try:
        with evaluating(model):
            model(input_ids=torch.ones(1, TRIAL_TOKENS, dtype=torch.long, device=input_device(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not input_of:
        raise ValueError("The model has no linear layer to measure.")
    shapes = {name: layer_shape(module) for name, module in layers.items() if name in input_of}
    return FisherCost(
        len(shapes), len(set(input_of.values())), *file_and_memory(shapes, input_of, rank=rank, shrinkage=shrinkage)
    )


def seconds_by_trial(
    model: PreTrainedModel | PeftModel,
    rows: list[AlignmentRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    fisher_type: FisherType,
    rank: int,
    shrinkage: float,
    batch_size: int,
    seed: int,
) -> float:
    """Time of a whole pass over rows, from one batch of middling length and one decomposition of every dimension."""
    pad, device = pad_token_id(tokenizer), input_device(model)
    skip_unused = not isinstance(model, PeftModel)
    collector = Collector(linear_layers(model), rank, shrinkage < 1, seed, skip_unused=skip_unused)
    (warm,) = batches([AlignmentRow(rows[0].input_ids[:2], 1)], 1, pad, device)
    middle = next(islice(batches(rows, batch_size, pad, device), -(-len(rows) // batch_size) // 2, None))
    with evaluating(model), collector:
        run_batch(model, collector, warm, fisher_type, seed)  # which also makes the sums and their test matrices
        _wait_for(collector)
        began = time.monotonic()
        run_batch(model, collector, middle, fisher_type, seed)
        _wait_for(collector)
        seconds = time.monotonic() - began
    seconds *= sum(len(row.input_ids) for row in rows) / int(middle.attention_mask.sum())
    by_dim = defaultdict(list)
    for sketch in (*collector.inputs.values(), *collector.outputs.values()):
        by_dim[sketch.sums.shape[0]].append(sketch)
    for sketches in by_dim.values():
        began = time.monotonic()
        sketches[0].covariance(rank)
        seconds += len(sketches) * (time.monotonic() - began)
    return seconds


def _wait_for(collector: Collector) -> None:
    """Until every device has done its work: a number can't be read before."""
    for sketch in (*collector.inputs.values(), *collector.outputs.values()):
        sketch.trace.item()
