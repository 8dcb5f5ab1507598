"""Slow, obviously correct twins of the factored maths: dense matrices, float64."""

import torch
from torch import Tensor

from agl_trl.objective.collision import FrozenWeights
from agl_trl.objective.covariance import LowRankCovariance
from agl_trl.objective.quadratic_form import LayerMetric, LoraFactors


def dense(covariance: LowRankCovariance) -> Tensor:
    """`V diag(λ) Vᵀ + ρ (I − V Vᵀ)` as one matrix."""
    V = covariance.eigenvectors.double()
    identity = torch.eye(V.shape[0], dtype=torch.float64)
    return V @ torch.diag(covariance.eigenvalues.double()) @ V.T + covariance.remainder.double() * (identity - V @ V.T)


def low_rank(dim: int, rank: int, seed: int, dtype: torch.dtype = torch.float64) -> LowRankCovariance:
    """Random covariance with orthonormal eigenvectors and decaying eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    V = torch.linalg.qr(torch.randn(dim, rank, generator=generator, dtype=torch.float64)).Q
    eigenvalues = torch.linspace(5, 1, rank, dtype=torch.float64)
    return LowRankCovariance(V, eigenvalues, torch.tensor(0.3, dtype=torch.float64)).to(dtype)


def quadratic_form(delta: Tensor, X: Tensor, G: Tensor | None) -> Tensor:
    """`tr(ΔWᵀ G ΔW X)` with dense matrices."""
    left = delta if G is None else G @ delta
    return torch.trace(delta.T @ left @ X)


def shrunk(G: Tensor, shrinkage: float) -> Tensor:
    """`(1 − δ) G / mean_eig(G) + δ I` with dense matrices."""
    mean = torch.trace(G) / G.shape[0]
    return (1 - shrinkage) * G / mean + shrinkage * torch.eye(G.shape[0], dtype=G.dtype)


def projected(delta: Tensor, X: LowRankCovariance, G: LowRankCovariance | None, energy: float) -> Tensor:
    """
    `P_A(ΔW)` by brute force over full eigenbases: the eigenpair products that hold the first `energy` of `tr 𝓕`, of those
    in the kept eigenspaces.
    """
    mu, U = (
        torch.linalg.eigh(dense(G))
        if G is not None
        else (torch.ones(delta.shape[0]).double(), torch.eye(delta.shape[0]).double())
    )
    lam, V = torch.linalg.eigh(dense(X))
    products = mu[:, None] * lam[None, :]
    coefficients = U.T @ delta @ V
    descending = products.flatten().sort(descending=True).values
    before = descending.cumsum(0) - descending
    smallest = descending[before < energy * products.sum() * (1 - 1e-12)][-1]
    kept = torch.zeros_like(products, dtype=torch.bool)
    # eigh is ascending: the kept eigenpairs come last, the remainder, of equal eigenvalues, before them.
    kept[-(G.eigenvalues.shape[0] if G is not None else len(mu)) :, -X.eigenvalues.shape[0] :] = True
    return U @ torch.where(kept & (products >= smallest * (1 - 1e-9)), coefficients, 0) @ V.T


D_OUT, D_IN, R = 10, 14, 3


def case(with_output: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, LayerMetric]:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(R, D_IN, generator=generator, dtype=torch.float64)
    B = torch.randn(D_OUT, R, generator=generator, dtype=torch.float64)
    G = low_rank(D_OUT, 4, seed + 1).shrunk(0.2) if with_output else None
    return A, B, LayerMetric(low_rank(D_IN, 5, seed + 2), G, torch.tensor(2.0, dtype=torch.float64))


def dense_metric(metric: LayerMetric) -> tuple[torch.Tensor, torch.Tensor | None]:
    return dense(metric.input), dense(metric.output) if metric.output is not None else None


SHAPES = [(10, 14, 3), (6, 14, 3), (10, 14, 3)]


def guarded_layers(with_output: bool, seed: int = 0):
    """Factors, metrics of alignment and task, and frozen weights of three layers of two shapes."""
    generator = torch.Generator().manual_seed(seed)
    factors, metrics, task_metrics, weights = [], [], [], []
    for i, (d_out, d_in, r) in enumerate(SHAPES):
        factors.append(
            LoraFactors(
                torch.randn(r, d_in, generator=generator).requires_grad_(),
                (0.3 * torch.randn(d_out, r, generator=generator)).requires_grad_(),
                0.5 + i,
            )
        )
        for target, shift in ((metrics, 0), (task_metrics, 50)):
            output = low_rank(d_out, 4, i + shift, torch.float32).shrunk(0.2) if with_output else None
            target.append(LayerMetric(low_rank(d_in, 5, i + shift + 10, torch.float32), output, torch.tensor(3.0 + i)))
        weights.append(torch.randn(d_out, d_in, generator=generator))
    frozen = FrozenWeights(
        [lambda rows, W=W: W[rows] for W in weights],
        torch.stack([W.square().mean().sqrt() for W in weights]),
        torch.stack([W.square().sum() for W in weights]),
    )
    return factors, metrics, task_metrics, weights, frozen
