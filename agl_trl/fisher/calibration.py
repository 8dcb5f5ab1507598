"""What a relative drift means in behaviour, on this model: KL on protected rows against D, along a few directions."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.alignment import AlignmentRow, batches
from ..modeling.forward import answer_logits, evaluating, input_device, recomputing
from ..modeling.lora import layer_shape, linear_layers
from ..objective.decomposition import Update, inner
from .reference_answers import ReferenceAnswers
from .statistics import FisherStatistics


RANK, ROWS, RANDOM_DIRECTIONS = 4, 8, 2
DRIFTS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
UNCERTAIN = (
    30.0  # ratio of the drifts that two directions take to one KL, from which on a translation is told as uncertain
)
BEYOND = 1e4  # nats per token

Direction = dict[str, tuple[Tensor, Tensor]]


def calibrate(
    model: PreTrainedModel | PeftModel,
    statistics: FisherStatistics,
    references: ReferenceAnswers,
    *,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """
    Measure KL against relative drift and keep the curve in the metadata of statistics, `metadata["kl_curve"]`: for every direction
    the mean KL of eight rows to refuse at seven drifts. Two directions are random, one is that of a first step of Adam which
    teaches every row another row's answer: a task pulls like this, and in such a direction a drift costs more.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Model at its reference weights; left as it was.
        statistics ([`FisherStatistics`]):
            Its statistics.
        references ([`ReferenceAnswers`]):
            Its answers.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the directions and of the rows.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a bar.
    """
    layers = {name: module for name, module in linear_layers(model).items() if name in statistics.input_of}
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(references.rows), generator=generator).tolist()[:ROWS]
    # Statistics are of the rows to refuse, and their metric says nothing of others.
    refusals = [i for i, kind in enumerate(references.kinds) if kind.endswith("/refuse")] or range(
        len(references.rows)
    )
    asked = [refusals[i] for i in torch.randperm(len(refusals), generator=generator).tolist()[:ROWS]]
    directions = [_random(layers, generator) for _ in range(RANDOM_DIRECTIONS)]
    directions.append(_gradient(model, layers, [references.rows[i] for i in order], references, generator))
    curves: list[list[float]] = []
    bar = tqdm(total=len(directions) * len(DRIFTS), desc="KL against drift", unit="pass", disable=not progress)
    with bar, torch.no_grad():
        for direction in directions:
            norm = _mean_drift(direction, statistics)
            curve = []
            for drift in DRIFTS:
                with _moved(layers, direction, math.sqrt(drift / norm)):
                    curve.append(references.kl(model, asked)[:, 0].mean().item())
                bar.update()
            curves.append(curve)
    # As the main process has it: a run weighs its terms by the slope. Where float16 overflows, the KL is beyond any budget.
    measured = torch.tensor(curves, device=PartialState().device).nan_to_num(nan=BEYOND, posinf=BEYOND)
    statistics.metadata["kl_curve"] = {"drifts": list(DRIFTS), "kl": broadcast(measured).tolist()}


def is_calibrated(statistics: FisherStatistics) -> bool:
    """Whether statistics carry a curve."""
    return statistics.metadata.get("kl_curve") is not None


def drift_at(statistics: FisherStatistics, kl: float) -> tuple[float, float]:
    """
    The relative drift at which a KL is reached, by the curve that statistics carry.

    Args:
        statistics ([`FisherStatistics`]):
            Calibrated statistics.
        kl (`float`):
            Nats per answer token.

    Returns:
        `tuple[float, float]`:
            The drift along the direction of a gradient, and the largest ratio of it to that of a random direction, either way.
    """
    drifts = drifts_at(statistics, kl)
    return drifts[-1], max(max(drift / drifts[-1], drifts[-1] / drift) for drift in drifts)


def drifts_at(statistics: FisherStatistics, kl: float) -> list[float]:
    """The relative drifts at which a KL is reached, by direction: random ones, and last that of a gradient."""
    curve = statistics.metadata["kl_curve"]
    return [_crossing(curve["drifts"], values, kl) for values in curve["kl"]]


def _crossing(drifts: Sequence[float], values: Sequence[float], kl: float) -> float:
    """Where a curve first reaches a value, by straight lines between points and beyond them with slope 1, all in logarithms."""
    x, y = [math.log(drift) for drift in drifts], [math.log(max(value, 1e-12)) for value in values]
    wanted = math.log(kl)
    if y[0] >= wanted:
        return math.exp(x[0] + wanted - y[0])
    for i in range(1, len(x)):
        if y[i] >= wanted:
            return math.exp(x[i - 1] + (x[i] - x[i - 1]) * (wanted - y[i - 1]) / (y[i] - y[i - 1]))
    return math.exp(x[-1] + wanted - y[-1])


def _random(layers: dict[str, nn.Module], generator: torch.Generator) -> Direction:
    """ΔW = BA of independent normal factors, of one relative size in all layers."""
    return {name: _factors(module, generator) for name, module in layers.items()}


def _factors(module: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    d_out, d_in = layer_shape(module)
    return torch.randn(RANK, d_in, generator=generator), torch.randn(d_out, RANK, generator=generator)


def _gradient(
    model: PreTrainedModel | PeftModel,
    layers: dict[str, nn.Module],
    rows: list[AlignmentRow],
    references: ReferenceAnswers,
    generator: torch.Generator,
) -> Direction:
    """Adam's first step from B = 0 on rows that have the answer of the next row: B moves by the sign of its gradient."""
    # No longer than the longest row, which the model reads: a long prompt with a long answer may be. A row keeps part of an answer.
    longest = max(len(row.input_ids) for row in rows)
    swapped = [
        AlignmentRow(
            (row.input_ids[: row.answer_start] + other.input_ids[other.answer_start :])[:longest], row.answer_start
        )
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
    ]
    device = input_device(model)
    direction = {
        name: (factors[0], torch.zeros_like(factors[1])) for name, factors in _random(layers, generator).items()
    }
    placed = {}
    for name, (A, B) in direction.items():
        where = next(layers[name].parameters()).device
        placed[name] = (
            A.to(device if where.type == "meta" else where),
            B.to(device if where.type == "meta" else where),
        )
        placed[name][1].requires_grad_()
    factors = [B for _, B in placed.values()]
    gradients = [torch.zeros_like(B) for B in factors]
    # Row by row: what a backward pass keeps of eight rows may be more than the model.
    for batch in batches(swapped, 1, references.metadata["pad_token_id"], device):
        with torch.enable_grad(), evaluating(model), recomputing(model), _moved(layers, placed, 1.0):
            logits, mask = answer_logits(model, batch)
            labels = batch.input_ids[0, 1:][batch.answer_mask[0, :-1]]
            log_probs = logits[0, mask[0]].float().log_softmax(-1)
            nll = -log_probs.gather(1, labels.to(log_probs.device)[:, None]).mean()
            of_row = torch.autograd.grad(nll, factors, allow_unused=True, materialize_grads=True)
        gradients = [total + part for total, part in zip(gradients, of_row, strict=True)]
    return {
        name: (A, -gradient.sign().cpu())
        for (name, (A, _)), gradient in zip(direction.items(), gradients, strict=True)
    }


def _mean_drift(direction: Direction, statistics: FisherStatistics) -> float:
    """Mean relative drift of a direction at scale 1, over its layers."""
    drifts = []
    for name, (A, B) in direction.items():
        metric = statistics.metric(name, A.device)
        drifts.append(inner(Update(A, B), Update(A, B), metric) / metric.weight_norm**2)
    return torch.stack(drifts).mean().item()


@contextmanager
def _moved(layers: dict[str, nn.Module], direction: Direction, scale: float) -> Iterator[None]:
    """The model with `scale · BA` added to every layer's weight."""
    handles = [module.register_forward_hook(partial(_add, direction[name], scale)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(factors: tuple[Tensor, Tensor], scale: float, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    A, B = (factor.to(output) for factor in factors)
    return output + scale * (args[0].to(output) @ A.mT) @ B.mT
