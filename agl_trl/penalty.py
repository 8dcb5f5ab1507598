"""The AlignGuard quadratic form of a LoRA update, factored and batched. Imports torch alone."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .sketch import LowRankCovariance


class LoraFactors(NamedTuple):
    """
    Update `ΔW = s B A` of one layer, never multiplied out.

    Args:
        A (`Tensor`):
            `lora_A` weight, of shape `(r, d_in)`.
        B (`Tensor`):
            `lora_B` weight, of shape `(d_out, r)`.
        scaling (`float`):
            s: α/r, or α/√r with rsLoRA.
    """

    A: Tensor
    B: Tensor
    scaling: float


class LayerMetric(NamedTuple):
    """
    K-FAC Fisher metric `𝓕 = G_δ ⊗ X` of one layer and the norm of its weight in it.

    Args:
        input (`LowRankCovariance`):
            Input covariance `X = E[x xᵀ]`, of dimension `d_in`.
        output (`LowRankCovariance`, *optional*):
            Damped output-gradient covariance `G_δ`, of dimension `d_out`; `None` is the identity (δ = 1).
        weight_norm (`Tensor`):
            `‖W‖_𝓕 = √tr(Wᵀ G_δ W X)`, a scalar.
    """

    input: LowRankCovariance
    output: LowRankCovariance | None
    weight_norm: Tensor

    def mean_eigenvalue(self) -> Tensor:
        """Mean eigenvalue of 𝓕, that of X, because `G_δ` has mean eigenvalue one."""
        return self.input.trace() / self.input.dim


def quadratic_form(A: Tensor, B: Tensor, scaling: Tensor | float, metric: LayerMetric) -> Tensor:
    """
    Squared norm of the update in the Fisher metric (AlignGuard-LoRA, sec. 4.1; here the complete form),

        ‖ΔW‖²_𝓕 = tr(ΔWᵀ G_δ ΔW X) = s² · tr((Bᵀ G_δ B)(A X Aᵀ)),

    in O(r·(d_in + d_out)·(r + k)); with δ = 1 it is `E‖ΔW x‖²`. Batched over leading dimensions.

    Args:
        A (`Tensor`):
            Of shape `(..., r, d_in)`.
        B (`Tensor`):
            Of shape `(..., d_out, r)`.
        scaling (`Tensor` or `float`):
            s, of shape `(...)`.
        metric (`LayerMetric`):
            Metric with the same leading dimensions.

    Returns:
        `Tensor`: of shape `(...)`.
    """
    outer = B.mT @ B if metric.output is None else metric.output.gram(B.mT)  # (..., r, r)
    return scaling**2 * (outer * metric.input.gram(A)).sum((-2, -1))


def dense_quadratic_form(weight: Tensor, metric: LayerMetric) -> Tensor:
    """`tr(Wᵀ G_δ W X)` of a dense matrix `W` of shape `(..., d_out, d_in)`; used once per layer, for `‖W‖²_𝓕`."""
    form = metric.input.row_forms(weight).sum(-1)
    if metric.output is None:
        return form
    projected = metric.output.eigenvectors.mT @ weight  # (..., k, d_in)
    return metric.output.remainder * form + (metric.output.excess * metric.input.row_forms(projected)).sum(-1)


class LayerGroup(NamedTuple):
    """Layers of equal shape, on one device, handled by one batched call: their positions, scalings and stacked metrics."""

    indices: list[int]
    scaling: Tensor
    metric: LayerMetric


def grouped(
    metrics: Sequence[LayerMetric],
    factors: Sequence[LoraFactors],
    others: Sequence[LayerMetric] | None = None,
) -> list[LayerGroup]:
    """
    Group layers whose tensors stack.

    Args:
        metrics (`Sequence[LayerMetric]`):
            One per layer.
        factors (`Sequence[LoraFactors]`):
            Factors of the same layers; only their shapes, scalings and devices are read.
        others (`Sequence[LayerMetric]`, *optional*):
            Second metrics of the same layers that must stack too.
    """
    groups: dict[tuple, list[int]] = defaultdict(list)
    for index, (metric, factor) in enumerate(zip(metrics, factors, strict=True)):
        ranks = [_ranks(metric)] + ([_ranks(others[index])] if others is not None else [])
        groups[factor.A.device, factor.A.shape, factor.B.shape, *ranks].append(index)
    return [
        LayerGroup(
            indices,
            torch.tensor([factors[i].scaling for i in indices], device=device),
            stacked([metrics[i] for i in indices], device),
        )
        for (device, *_), indices in groups.items()
    ]


def _ranks(metric: LayerMetric) -> tuple[int, int | None]:
    output = None if metric.output is None else metric.output.eigenvalues.shape[-1]
    return metric.input.eigenvalues.shape[-1], output


def stacked(metrics: Sequence[LayerMetric], device: torch.device) -> LayerMetric:
    """One metric with a leading layer dimension, in float32."""

    def stack(covariances: list[LowRankCovariance]) -> LowRankCovariance:
        return LowRankCovariance(
            *(torch.stack([t.to(device).float() for t in parts]) for parts in zip(*covariances, strict=True))
        )

    outputs = [metric.output for metric in metrics if metric.output is not None]
    return LayerMetric(
        input=stack([metric.input for metric in metrics]),
        output=stack(outputs) if outputs else None,
        weight_norm=torch.stack([metric.weight_norm.to(device).float() for metric in metrics]),
    )


class RelativeDrift:
    """
    Relative drift of every layer, `‖ΔW‖²_𝓕 / ‖W‖²_𝓕`: *the* number of this project, dimensionless, and zero at the
    reference weights.

    Args:
        metrics (`Sequence[LayerMetric]`):
            One per layer.
        factors (`Sequence[LoraFactors]`):
            Factors of the same layers, in the same order; only their shapes, scalings and devices are read here.
    """

    def __init__(self, metrics: Sequence[LayerMetric], factors: Sequence[LoraFactors]):
        self.groups = grouped(metrics, factors)
        order = [index for group in self.groups for index in group.indices]
        self.inverse = torch.tensor(order).argsort().to(factors[0].A.device)

    def __call__(self, factors: Sequence[LoraFactors]) -> Tensor:
        """Relative drift per layer, of shape `(len(factors),)`, in float32 on the device of the first layer's factors."""
        device = factors[0].A.device
        drifts = []
        for indices, scaling, metric in self.groups:
            A = torch.stack([factors[i].A for i in indices]).float()
            B = torch.stack([factors[i].B for i in indices]).float()
            drifts.append((quadratic_form(A, B, scaling, metric) / metric.weight_norm**2).to(device))
        return torch.cat(drifts)[self.inverse]
