"""Drift of weights layer by layer: of LoRA by its factors, of other adapters and of checkpoints by the ΔW of every layer."""

from collections.abc import Iterable
from math import isfinite
from typing import NamedTuple, Self

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..fisher.statistics import FisherStatistics
from ..modeling.lora import (
    AdaptedLayer,
    active_adapter,
    base_weight,
    each_frozen,
    layer_shape,
    linear_layers,
    one_frozen,
)
from ..modeling.trained_tensors import changed_tensors, same_but_for_rounding, trained_tensors
from ..modeling.tuned_layers import is_quantised, layer_change, tuned_layers
from ..objective.decomposition import Update
from ..objective.quadratic_form import dense_quadratic_form
from .parts import update_parts


class LayerDrifts(NamedTuple):
    """
    What the layers of an update have, those of [`DriftReport`].

    Args:
        names (`list[str]`):
            Names of the layers; none where no layer has a ΔW.
        drift, alignment, overlap (`Tensor`):
            Relative drift, alignment energy and overlap, each of shape `(layers,)`.
        uncovered (`dict[str, float]`):
            What changed beside them, by name, with the norm of its change over its own.
    """

    names: list[str]
    drift: Tensor
    alignment: Tensor
    overlap: Tensor
    uncovered: dict[str, float]

    @classmethod
    def of(cls, rows: Iterable[tuple[str, Tensor, Tensor, Tensor]], uncovered: dict[str, float]) -> Self:
        """
        Name, drift, alignment energy and overlap of every layer in turn, and what changed beside them.

        Raises:
            `ValueError`: If the change of a tensor beside them is not finite.
        """
        for name, change in uncovered.items():
            if not isfinite(change):
                raise ValueError(f"The change of '{name}' is not finite: the tensor holds NaN or infinity.")
        names, *columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
        drift, alignment, overlap = (torch.stack(column) if column else torch.empty(0) for column in columns)
        moved = {name: change for name, change in uncovered.items() if change != 0}
        return cls(names, drift, alignment, overlap, moved)


def _row(
    name: str, delta: Tensor, weight: Tensor, statistics: FisherStatistics, energy: float
) -> tuple[str, Tensor, Tensor, Tensor]:
    """Of a ΔW that is at hand whole: a product with the smaller identity, so that the formulas of the parts are those of factors."""
    (d_out, d_in), metric = delta.shape, statistics.metric(name, delta.device)
    one = torch.eye(min(d_out, d_in), device=delta.device)
    update = Update(delta, one) if d_out < d_in else Update(one, delta)
    drift = (dense_quadratic_form(delta, metric) / metric.weight_norm**2).cpu()
    return name, drift, *update_parts(update, metric, energy, one_frozen(weight))


def factored_drifts(layers: list[AdaptedLayer], statistics: FisherStatistics, energy: float) -> LayerDrifts:
    """Of LoRA layers, of which there is at least one, by their factors."""
    factors = [layer.factors() for layer in layers]
    drift = statistics.drift_of(layers)(factors).cpu()
    rows = []
    for layer, one, (A, B, scaling), weights in zip(layers, drift, factors, each_frozen(layers), strict=True):
        metric = statistics.metric(layer.name, A.device)
        rows.append((layer.name, one, *update_parts(Update(A.float(), B.float() * scaling), metric, energy, weights)))
    return LayerDrifts.of(rows, {tensor.name: tensor.relative_change() for tensor in layers[0].beside})


def adapter_drifts(model: PeftModel, statistics: FisherStatistics | None, energy: float) -> LayerDrifts:
    """
    Of the active adapter, whatever its method.

    Raises:
        `ValueError`: If there are no statistics, but layers that need some.
    """
    adapter, covered = active_adapter(model), linear_layers(model)
    if covered and statistics is None:
        raise ValueError("The drift of these weights needs Fisher statistics of the base model: none were given.")
    beside = {tensor.name: tensor.relative_change() for tensor in trained_tensors(model, adapter)}
    rows = []
    for name, module in tuned_layers(model, adapter):
        if f"{name}.weight" in beside:  # LoRA on an embedding
            continue
        change = layer_change(module, base_weight(module) if is_quantised(module) else None)
        beside |= {f"{name}.{end}": value for end, value in change.others.items()}
        if statistics is not None and name in covered and change.delta is not None and change.weight is not None:
            rows.append(_row(name, change.delta, change.weight, statistics, energy))
    return LayerDrifts.of(rows, beside)


def checkpoint_drifts(
    base: PreTrainedModel, tuned: PreTrainedModel, statistics: FisherStatistics, energy: float
) -> LayerDrifts:
    """
    Of a checkpoint, over the linear layers that the statistics cover.

    Raises:
        `ValueError`: If a layer has another shape in the tuned model or is not there, or the statistics cover none.
    """
    others = linear_layers(tuned, head=True)
    rows = []
    for name, module in linear_layers(base, head=True).items():
        if name not in statistics.input_of:
            continue
        if name not in others or layer_shape(others[name]) != layer_shape(module):
            raise ValueError(f"The tuned model has no layer '{name}' of the base model's shape {layer_shape(module)}.")
        W = base_weight(module)
        delta = base_weight(others[name]).to(W.device) - W
        if same_but_for_rounding(others[name].get_parameter("weight"), module.get_parameter("weight")):
            delta = torch.zeros_like(W)
        rows.append(_row(name, delta, W, statistics, energy))
    if not rows:
        raise ValueError("The Fisher statistics cover no layer of this base model: they are of another one.")
    return LayerDrifts.of(rows, changed_tensors(base, tuned, without={f"{name}.weight" for name, *_ in rows}))
