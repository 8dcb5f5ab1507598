"""
Alignment-critical and task part of a LoRA update, as factors that are never multiplied out. Imports torch alone.

An update is a pair `(A, B)` that stands for `ΔW = B A`, of shapes `(..., r, d_in)` and `(..., d_out, r)`; the scaling is
folded into B. All functions are batched over leading dimensions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .penalty import LayerMetric
from .sketch import LowRankCovariance


class Update(NamedTuple):
    """`ΔW = B A`, with A of shape `(..., r, d_in)` and B of shape `(..., d_out, r)`."""

    A: Tensor
    B: Tensor


def critical_mask(metric: LayerMetric, fisher_energy: float) -> Tensor:
    """
    Which eigenpair products `(u_i of G_δ) ⊗ (v_j of X)` span the alignment-critical subspace `P_A`: those with the largest
    `μ_i λ_j`, in descending order until they hold `fisher_energy` of `tr 𝓕 = tr G_δ · tr X` (AlignGuard-LoRA, sec. 4.1).

    A remainder is never part of it: where the kept eigenpairs hold less than `fisher_energy`, all of them are taken and the
    subspace stops there, instead of swallowing the whole space.

    Args:
        metric (`LayerMetric`):
            Metric of one layer, without leading dimensions.
        fisher_energy (`float`):
            Share of the trace, between 0 and 1.

    Returns:
        `Tensor`: 1.0 for products in the subspace, of shape `(k_out + 1, k_in + 1)`; the last row and column are the
        remainders. With `metric.output` None it has one row.
    """
    mu, left = _spectrum(metric.output, metric.input.remainder)
    eigenvalues, right = _spectrum(metric.input, metric.input.remainder)
    products = (mu.unsqueeze(1) * eigenvalues).flatten()
    traces = products * (left.unsqueeze(1) * right).flatten()
    order = products.argsort(descending=True, stable=True)
    before = traces[order].cumsum(0) - traces[order]
    mask = torch.zeros_like(products)
    mask[order[before < fisher_energy * traces.sum()]] = 1.0
    mask = mask.reshape(len(mu), len(eigenvalues))
    if metric.input.eigenvalues.shape[-1] < metric.input.dim:
        mask[:, -1] = 0.0
    if metric.output is not None and metric.output.eigenvalues.shape[-1] < metric.output.dim:
        mask[-1, :] = 0.0
    return mask


def _spectrum(covariance: LowRankCovariance | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and their multiplicities, the remainder last; of the identity a single one."""
    if covariance is None:
        return torch.ones_like(like).unsqueeze(0), torch.ones_like(like).unsqueeze(0)
    k = len(covariance.eigenvalues)
    multiplicities = torch.ones_like(covariance.eigenvalues[:1]).expand(k + 1).clone()
    multiplicities[-1] = covariance.dim - k
    return torch.cat([covariance.eigenvalues, covariance.remainder.unsqueeze(0)]), multiplicities


def project(update: Update, metric: LayerMetric, mask: Tensor) -> Update:
    """
    `P(ΔW) = Σ_ij m_ij (u_i u_iᵀ) ΔW (v_j v_jᵀ)` over the eigenpair products of a metric, the remainders included.

    With `metric.output` None the projection acts from the right alone and keeps B and the rank; otherwise the result has
    rank `r + k_out`.

    Args:
        update (`Update`):
            ΔW.
        metric (`LayerMetric`):
            Metric whose eigenvectors are used.
        mask (`Tensor`):
            m, of shape `(..., k_out + 1, k_in + 1)`.
    """
    A, B = update
    V = metric.input.eigenvectors
    AV = A @ V  # (..., r, k_in)
    low, corner = mask[..., -1:, :-1], mask[..., -1:, -1:]
    right = (AV * (low - corner)) @ V.mT + corner * A  # what stands behind B
    if metric.output is None:
        return Update(right, B)
    U = metric.output.eigenvectors
    D = (U.mT @ B) @ A  # (..., k_out, d_in)
    high, edge = mask[..., :-1, :-1], mask[..., :-1, -1:]
    DV = D @ V
    left = (DV * (high - low - edge + corner)) @ V.mT + (edge - corner) * D  # what stands behind U
    return Update(torch.cat([right, left], -2), torch.cat([B, U.expand(*B.shape[:-1], U.shape[-1])], -1))


def subtract(whole: Update, part: Update) -> Update:
    """`ΔW − ΔW_part`; where both share B, the rank does not grow."""
    if part.B is whole.B:
        return Update(whole.A - part.A, whole.B)
    return Update(torch.cat([whole.A, -part.A], -2), torch.cat([whole.B, part.B], -1))


def inner(one: Update, other: Update, metric: LayerMetric | None = None) -> Tensor:
    """`⟨U, V⟩_𝓕 = tr(Uᵀ G_δ V X)` of two updates, of shape `(...)`; with `metric` None the Frobenius product."""
    if metric is None:
        return ((one.B.mT @ other.B) * (one.A @ other.A.mT)).sum((-2, -1))
    outer = one.B.mT @ other.B if metric.output is None else metric.output.gram(one.B.mT, other.B.mT)
    return (outer * metric.input.gram(one.A, other.A)).sum((-2, -1))
