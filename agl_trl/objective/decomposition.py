"""
Alignment-critical and task part of a LoRA update, as factors that are never multiplied out. Imports torch alone.

An update is a pair `(A, B)` that stands for `ΔW = B A`, of shapes `(..., r, d_in)` and `(..., d_out, r)`; the scaling is
folded into B. All functions are batched over leading dimensions.
"""

import torch
from torch import Tensor

from .covariance import LowRankCovariance
from .quadratic_form import LayerMetric


class Update:
    """`ΔW = B A`, with A of shape `(..., r, d_in)` and B of shape `(..., d_out, r)`."""

    def __init__(self, A: Tensor, B: Tensor):
        self.A, self.B = A, B
        # V beside its product: held, it keeps its id, which the next temporary tensor would be given otherwise.
        self._coordinates: dict[int, tuple[Tensor, Tensor]] = {}

    def coordinates(self, V: Tensor) -> Tensor:
        """`A V`, of shape `(..., r, k)`, in the eigenvectors of a metric; multiplied once for all terms that read it."""
        if id(V) not in self._coordinates:
            self._coordinates[id(V)] = V, self.A @ V
        return self._coordinates[id(V)][1]


def critical_mask(metric: LayerMetric, fisher_energy: float) -> Tensor:
    """
    Which eigenpair products `(u_i of G_δ) ⊗ (v_j of X)` span the alignment-critical subspace `P_A`: those with the largest
    `μ_i λ_j`, in descending order until they hold `fisher_energy` of `tr 𝓕 = tr G_δ · tr X`.

    A remainder is never part of it: where the kept eigenpairs hold less than `fisher_energy`, all of them are taken and the
    subspace stops there, instead of swallowing the whole space.

    Args:
        metric (`LayerMetric`):
            Metric of one layer, without leading dimensions.
        fisher_energy (`float`):
            Share of the trace, between 0 and 1.

    Returns:
        `Tensor`: m, 1.0 for products in the subspace, of shape `(k_out, k_in)`; with `metric.output` None it has one row,
        for every direction of the output.
    """
    mu, left = _spectrum(metric.output, metric.input.remainder)
    eigenvalues, right = _spectrum(metric.input, metric.input.remainder)
    products = (mu.unsqueeze(1) * eigenvalues).flatten()
    traces = products * (left.unsqueeze(1) * right).flatten()
    order = products.argsort(descending=True, stable=True)
    before = traces[order].cumsum(0) - traces[order]
    mask = torch.zeros_like(products)
    mask[order[before < fisher_energy * traces.sum()]] = 1.0
    mask = mask.reshape(len(mu), len(eigenvalues))[:, :-1]
    return mask if metric.output is None else mask[:-1]


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
    `P(ΔW) = Σ_ij m_ij (u_i u_iᵀ) ΔW (v_j v_jᵀ) = U (m ∘ UᵀΔWV) Vᵀ` over the kept eigenpair products of a metric.

    With `metric.output` None the projection acts from the right alone and keeps B; otherwise the result has rank `k_out`.

    Args:
        update (`Update`):
            ΔW.
        metric (`LayerMetric`):
            Metric whose eigenvectors are used.
        mask (`Tensor`):
            m, of shape `(..., k_out, k_in)`.
    """
    V = metric.input.eigenvectors
    if metric.output is None:
        return Update((mask * update.coordinates(V)) @ V.mT, update.B)
    U = metric.output.eigenvectors
    return Update((mask * (U.mT @ update.B @ update.coordinates(V))) @ V.mT, U)


def critical_inner(one: Update, other: Update, metric: LayerMetric, mask: Tensor) -> Tensor:
    """
    `⟨P(U), V⟩_𝓕 = ⟨P(U), P(V)⟩_𝓕 = Σ_ij m_ij μ_i λ_j (u_iᵀ U v_j)(u_iᵀ V v_j)`, of shape `(...)`: the inner product of the
    critical parts of two updates, from their coordinates in the eigenbasis. Arguments as of [`project`].
    """
    weight = mask * metric.input.eigenvalues.unsqueeze(-2)
    left, right = (update.coordinates(metric.input.eigenvectors) for update in (one, other))
    if metric.output is None:
        return (weight * left * (one.B.mT @ other.B @ right)).sum((-2, -1))
    U = metric.output.eigenvectors
    left = U.mT @ one.B @ left
    right = left if other is one else U.mT @ other.B @ right
    return (metric.output.eigenvalues.unsqueeze(-1) * weight * left * right).sum((-2, -1))


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
    X = metric.input  # ρ I + V diag(λ − ρ) Vᵀ
    left, right = (update.coordinates(X.eigenvectors) for update in (one, other))
    gram = X.remainder[..., None, None] * (one.A @ other.A.mT) + (left * X.excess.unsqueeze(-2)) @ right.mT
    return (outer * gram).sum((-2, -1))
