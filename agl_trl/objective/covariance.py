"""Streaming covariances: leading eigenpairs plus an isotropic remainder. Imports torch alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


# Up to this dimension the covariance is accumulated exactly; above, through a sketch of `SKETCH_FACTOR * rank` columns.
EXACT_UP_TO = 1024
SKETCH_FACTOR = 2
_NAMED_PRECISIONS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)  # a name in place of `allow_tf32`


class LowRankCovariance(NamedTuple):
    """
    Covariance kept as its leading eigenpairs and an isotropic remainder,

        C = V diag(λ) Vᵀ + ρ (I − V Vᵀ).

    All operations accept leading batch dimensions.

    Args:
        eigenvectors (`Tensor`):
            V, of shape `(..., d, k)`, orthonormal columns.
        eigenvalues (`Tensor`):
            λ, of shape `(..., k)`, in descending order.
        remainder (`Tensor`):
            ρ, of shape `(...)`: mean of the eigenvalues that were dropped.
    """

    eigenvectors: Tensor
    eigenvalues: Tensor
    remainder: Tensor

    @property
    def dim(self) -> int:
        """Dimension d of the space."""
        return self.eigenvectors.shape[-2]

    @property
    def excess(self) -> Tensor:
        """λ − ρ, of shape `(..., k)`: what the eigenpairs add to the isotropic part, `C = ρ I + V diag(λ − ρ) Vᵀ`."""
        return self.eigenvalues - self.remainder.unsqueeze(-1)

    def gram(self, rows: Tensor, others: Tensor | None = None) -> Tensor:
        """
        `Z C Yᵀ` of shape `(..., n, m)` for rows `Z` of shape `(..., n, d)` and `Y` of shape `(..., m, d)` (default: Z), in
        O((n + m)·d·k + n·m·d).
        """
        others = rows if others is None else others
        projected = rows @ self.eigenvectors  # (..., n, k)
        others_projected = projected if others is rows else others @ self.eigenvectors
        isotropic = self.remainder[..., None, None] * (rows @ others.mT)
        return isotropic + (projected * self.excess.unsqueeze(-2)) @ others_projected.mT

    def apply(self, rows: Tensor) -> Tensor:
        """`Z C`, of shape `(..., n, d)`, for rows `Z` of shape `(..., n, d)`."""
        projected = (rows @ self.eigenvectors) * self.excess.unsqueeze(-2)  # (..., n, k)
        return self.remainder[..., None, None] * rows + projected @ self.eigenvectors.mT

    def row_forms(self, rows: Tensor) -> Tensor:
        """Diagonal of `Z C Zᵀ`, of shape `(..., n)`: the quadratic form of every row of `Z`, of shape `(..., n, d)`."""
        projected = rows @ self.eigenvectors  # (..., n, k)
        isotropic = self.remainder.unsqueeze(-1) * rows.square().sum(-1)
        return isotropic + (projected.square() * self.excess.unsqueeze(-2)).sum(-1)

    def trace(self) -> Tensor:
        """`tr C`, of shape `(...)`."""
        return self.eigenvalues.sum(-1) + self.remainder * (self.dim - self.eigenvalues.shape[-1])

    def shrunk(self, shrinkage: float) -> "LowRankCovariance":
        """
        Covariance scaled to mean eigenvalue one and mixed with the identity,

            C_δ = (1 − δ) · C / mean_eig(C) + δ · I,

        so that its mean eigenvalue is one for every δ. A covariance that is zero becomes the identity.

        Args:
            shrinkage (`float`):
                δ, between 0 and 1.
        """
        mean = self.trace() / self.dim
        share = torch.where(
            mean > 0, (1 - shrinkage) / mean.clamp_min(torch.finfo(mean.dtype).tiny), torch.zeros_like(mean)
        )
        floor = torch.where(mean > 0, torch.full_like(mean, shrinkage), torch.ones_like(mean))
        eigenvalues = self.eigenvalues * share.unsqueeze(-1) + floor.unsqueeze(-1)
        return LowRankCovariance(self.eigenvectors, eigenvalues, self.remainder * share + floor)

    def to(self, *args, **kwargs) -> "LowRankCovariance":
        """Same covariance with every tensor moved or cast as by `Tensor.to`."""
        return LowRankCovariance(*(tensor.to(*args, **kwargs) for tensor in self))


def sketch_matrix(dim: int, rank: int, seed: int) -> Tensor | None:
    """
    Test matrix Ω of the sketch, of shape `(dim, SKETCH_FACTOR * rank)` with orthonormal columns, float32; `None` up to
    `EXACT_UP_TO`, where the covariance is exact.

    Drawn on the CPU from its own generator, so that it is the same on every device and rank, and the global random
    state stays untouched.
    """
    width = SKETCH_FACTOR * rank
    if dim <= EXACT_UP_TO or width >= dim:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, width, generator=generator, dtype=torch.float64)).Q.float()


@contextmanager
def in_float32(device: torch.device) -> Iterator[None]:
    """
    Products of matrices in float32 itself. A trainer's `bf16` puts autocast around the model's forward pass, in which the hooks run;
    its `tf32` rounds factors to 10 bits, more than what eigenvalues leave to the remainder.
    """
    matmul = torch.backends.cuda.matmul
    option, fast, full = ("fp32_precision", "tf32", "ieee") if _NAMED_PRECISIONS else ("allow_tf32", True, False)
    rounds = getattr(matmul, option) == fast
    if rounds:
        setattr(matmul, option, full)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if rounds:
            setattr(matmul, option, fast)


class CovarianceSketch:
    """
    Single-pass estimate of `C = E[x xᵀ]`.

    Accumulates `Y = Σ xᵀ(x Ω)`, the trace `Σ ‖x‖²` and the number of rows; all three are sums over rows, so neither the
    batch size nor the number of processes changes the result beyond rounding. With Ω = I (small dimensions) Y is the
    exact sum; otherwise the eigenpairs come from the Nyström approximation `Y (ΩᵀY)⁻¹ Yᵀ` (Tropp et al., 2017, "Fixed-rank
    approximation of a positive-semidefinite matrix from streaming data", algorithm 3).

    Args:
        dim (`int`):
            Dimension of x.
        omega (`Tensor`, *optional*):
            Test matrix of [`sketch_matrix`], `None` for the exact sum.
        device (`torch.device`, *optional*):
            Where the sums live.
    """

    def __init__(self, dim: int, omega: Tensor | None = None, device: torch.device | None = None):
        self.omega = None if omega is None else omega.to(device)
        self.sums = torch.zeros(dim, dim if omega is None else omega.shape[1], device=device)
        self.trace = torch.zeros((), device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    def to(self, device: torch.device, omega: Tensor | None) -> None:
        """Move the sums to a device, in place, given the test matrix there."""
        self.sums, self.trace, self.count = (t.to(device) for t in (self.sums, self.trace, self.count))
        self.omega = omega

    def update(self, rows: Tensor) -> None:
        """Add rows of shape `(n, dim)`."""
        rows = rows.float()
        with in_float32(rows.device):
            self.sums.addmm_(rows.mT, rows if self.omega is None else rows @ self.omega)
        self.trace += rows.square().sum()
        self.count += rows.shape[0]

    def covariance(self, rank: int) -> LowRankCovariance:
        """
        Leading `min(rank, dim)` eigenpairs and the mean of the remaining eigenvalues, float32 on the CPU, computed in
        float64.
        """
        count = self.count.item()
        sums = self.sums.cpu().double() / count
        dim = sums.shape[0]
        rank = min(rank, dim)
        if self.omega is None:
            eigenvalues, eigenvectors = torch.linalg.eigh((sums + sums.mT) / 2)
            eigenvalues, eigenvectors = eigenvalues.flip(-1).clamp_min(0), eigenvectors.flip(-1)
            dropped = eigenvalues[rank:].sum()
        else:
            eigenvalues, eigenvectors = _nystrom(sums, self.omega.cpu().double())
            dropped = (self.trace.cpu().double() / count - eigenvalues[:rank].sum()).clamp_min(0)
        remainder = dropped / max(dim - rank, 1)
        return LowRankCovariance(
            eigenvectors[:, :rank].float().contiguous(), eigenvalues[:rank].float(), remainder.float()
        )


def _nystrom(sums: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending) and eigenvectors of `Y (ΩᵀY)⁻¹ Yᵀ`; the shift ν keeps the Cholesky factor stable."""
    shift = torch.finfo(torch.float32).eps * sums.norm()  # Y was accumulated in float32
    if shift == 0:
        return sums.new_zeros(omega.shape[1]), omega
    shifted = sums + shift * omega
    core = omega.mT @ shifted
    factor, failed = torch.linalg.cholesky_ex((core + core.mT) / 2)
    if failed:  # fewer rows than columns, and rounding: take the square root through the eigenvalues instead
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        root = shifted @ (vectors / values.clamp_min(shift).sqrt())
    else:
        root = torch.linalg.solve_triangular(factor, shifted.mT, upper=False).mT
    eigenvectors, singular, _ = torch.linalg.svd(root, full_matrices=False)
    return (singular.square() - shift).clamp_min(0), eigenvectors
