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


def alignment_energy(A: Tensor, B: Tensor, scaling: float, metric: LayerMetric, fisher_energy: float) -> Tensor:
    """
    Share of `‖ΔW‖²_𝓕` that lies in the alignment-critical subspace, `‖P_A(ΔW)‖²_𝓕`.

    `P_A` spans the eigenpair products `(u_i of G_δ) ⊗ (v_j of X)` with the largest `μ_i λ_j`, taken in descending order
    until they hold `fisher_energy` of `tr 𝓕 = tr G_δ · tr X`. The isotropic remainder of either side counts as one
    eigenspace with its multiplicity.

    Args:
        A (`Tensor`):
            Of shape `(r, d_in)`.
        B (`Tensor`):
            Of shape `(d_out, r)`.
        scaling (`float`):
            s.
        metric (`LayerMetric`):
            Metric of the layer.
        fisher_energy (`float`):
            Share of the trace, between 0 and 1.

    Returns:
        `Tensor`: scalar.
    """
    blocks, traces = _energy_blocks(A, B, scaling, metric)
    order = (traces / _multiplicities(metric, traces)).flatten().argsort(descending=True, stable=True)
    before = traces.flatten()[order].cumsum(0) - traces.flatten()[order]
    chosen = order[before < fisher_energy * traces.sum()]
    return blocks.flatten()[chosen].sum()


def _energy_blocks(A: Tensor, B: Tensor, scaling: float, metric: LayerMetric) -> tuple[Tensor, Tensor]:
    """`‖·‖²_𝓕` of ΔW, and trace of 𝓕, in every eigenpair product; last row and column are the remainders."""
    X, G = metric.input, metric.output
    AV = A @ X.eigenvectors  # (r, k)
    rest = A @ A.mT - AV @ AV.mT  # (r, r), Gram matrix of A outside the eigenvectors
    if G is None:
        mu, left_traces = A.new_ones(1), A.new_full((1,), float(B.shape[0]))
        grams = (B.mT @ B).unsqueeze(0)  # (1, r, r)
    else:
        UB = G.eigenvectors.mT @ B  # (k_out, r)
        mu = torch.cat([G.eigenvalues, G.remainder.unsqueeze(0)])
        left_traces = mu * torch.cat([torch.ones_like(G.eigenvalues), A.new_tensor([G.dim - len(G.eigenvalues)])])
        grams = torch.cat([UB.unsqueeze(2) * UB.unsqueeze(1), (B.mT @ B - UB.mT @ UB).unsqueeze(0)])
    inside = torch.einsum("rk,mrs,sk->mk", AV, grams, AV) * X.eigenvalues  # (m, k)
    outside = torch.einsum("mrs,rs->m", grams, rest) * X.remainder  # (m,)
    blocks = scaling**2 * mu.unsqueeze(1) * torch.cat([inside, outside.unsqueeze(1)], 1)
    right_traces = torch.cat([X.eigenvalues, (X.remainder * (X.dim - len(X.eigenvalues))).unsqueeze(0)])
    return blocks, left_traces.unsqueeze(1) * right_traces


def _multiplicities(metric: LayerMetric, traces: Tensor) -> Tensor:
    """Number of dimensions of every eigenpair product, at least one, of the shape of `traces`."""
    X, G = metric.input, metric.output
    right = traces.new_tensor([1.0] * len(X.eigenvalues) + [max(X.dim - len(X.eigenvalues), 1)])
    if G is None:
        return right.unsqueeze(0)
    left = traces.new_tensor([1.0] * len(G.eigenvalues) + [max(G.dim - len(G.eigenvalues), 1)])
    return left.unsqueeze(1) * right


class RelativeDrift:
    """
    Relative drift of every layer, `‖ΔW‖²_𝓕 / ‖W‖²_𝓕`, with layers of equal shape stacked and handled by one batched call.

    The mean over layers is *the* number of this project: dimensionless, zero at the reference weights, and penalised by
    the trainers.

    Args:
        metrics (`Sequence[LayerMetric]`):
            One per layer.
        factors (`Sequence[LoraFactors]`):
            Factors of the same layers, in the same order; only their shapes, scalings and devices are read here.
    """

    def __init__(self, metrics: Sequence[LayerMetric], factors: Sequence[LoraFactors]):
        groups: dict[tuple, list[int]] = defaultdict(list)
        for index, (metric, factor) in enumerate(zip(metrics, factors, strict=True)):
            ranks = metric.input.eigenvalues.shape[-1], metric.output and metric.output.eigenvalues.shape[-1]
            groups[factor.A.device, factor.A.shape, factor.B.shape, ranks].append(index)
        self.groups = [
            (
                indices,
                torch.tensor([factors[i].scaling for i in indices], device=device),
                _stacked([metrics[i] for i in indices], device),
            )
            for (device, *_), indices in groups.items()
        ]
        order = [index for indices, _, _ in self.groups for index in indices]
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


def _stacked(metrics: list[LayerMetric], device: torch.device) -> LayerMetric:
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
