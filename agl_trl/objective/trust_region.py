"""The trust region: how far in the Fisher metric an update may be, and the step to the nearest that is within. Imports torch alone."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .quadratic_form import InputSide, LayerGroup, LoraFactors, RelativeDrift


SMOOTHING = 0.3  # share of a new measurement in the logarithm of what a drift costs
LARGEST_STEP = 2.0  # of that logarithm, per measurement, up or down
HALVINGS = 32  # of the logarithm of μ, whose range of about 40 comes to the precision of float32


class TrustRegion:
    """
    Limit on the mean relative drift D at which the KL on protected rows is expected to be c times its budget b,

        D ≤ c / ρ,    log ρ ← log ρ + 0.3 · clip(log((k/b) / D) − log ρ, −2, 2),

    where ρ is the share of the budget that a unit of drift takes, known at the start from the calibrated curve and measured anew
    whenever a KL k is. A measurement that is no positive number changes nothing.

    Args:
        radius (`float`):
            c, in budgets.
        share_per_drift (`Tensor`):
            ρ at the start: a scalar on the device of the first layer.
    """

    def __init__(self, radius: float, share_per_drift: Tensor):
        self.radius = radius
        self.share_per_drift = share_per_drift

    def limit(self) -> Tensor:
        """`c / ρ`, a scalar."""
        return self.radius / self.share_per_drift

    def observe(self, share: Tensor, drift: Tensor) -> None:
        """
        Learn from a measurement.

        Args:
            share (`Tensor`):
                `k/b`, of the behaviour that is nearest to its budget, a scalar.
            drift (`Tensor`):
                D of the same weights.
        """
        step = (share.to(drift.device) / drift / self.share_per_drift).log()
        step = torch.where(step.isfinite(), SMOOTHING * step.clamp(-LARGEST_STEP, LARGEST_STEP), 0)
        self.share_per_drift = self.share_per_drift * step.exp()


class _Coordinates(NamedTuple):
    """
    B of one group in coordinates in which the form is diagonal; `q = (s / ‖W‖_𝓕)² γ / L` with an eigenvalue γ of `G_δ`.

    Args:
        basis (`Tensor`, *optional*):
            Eigenvectors of `G_δ`, of shape `(layers, d_out, k)`; `None`: what is left of the space, with one γ for all of it.
        pull (`Tensor`):
            q, of shape `(layers, k or 1, 1)`.
        stiffness (`Tensor`):
            `q m`, m being the eigenvalues of M, of shape `(layers, k or 1, r)`.
        moved (`Tensor`):
            y, of shape `(layers, k or d_out, r)`.
        fixed (`Tensor`):
            c, what the fixed half of a continued adapter pulls to, of the same shape; zero of a new one.
    """

    basis: Tensor | None
    pull: Tensor
    stiffness: Tensor
    moved: Tensor
    fixed: Tensor

    def nearest(self, mu: Tensor) -> Tensor:
        """`(y + μ q c) / (1 + μ q m)` in every coordinate, back in the space of the output."""
        nearest = (self.moved + mu * self.pull * self.fixed) / (1 + mu * self.stiffness)
        return nearest if self.basis is None else self.basis @ nearest

    def sums(self) -> Tensor:
        """`q, q m, Σ y², Σ y c, Σ c²` over the coordinates that share q and m, of shape `(5, number)`."""
        products = [self.moved.square(), self.moved * self.fixed, self.fixed.square()]
        if self.basis is None:
            products = [product.sum(1, keepdim=True) for product in products]
        return torch.stack([self.pull.expand_as(self.stiffness), self.stiffness, *products]).flatten(1)


@torch.no_grad()
def step_within(
    drift: RelativeDrift,
    factors: Sequence[LoraFactors],
    inputs: Sequence[InputSide],
    limit: Tensor,
    *,
    continued: bool = False,
) -> list[Tensor]:
    """
    The step to the nearest B, A as it is, whose mean relative drift D is at most a limit. With `M = A X Aᵀ`, the minimum of
    `‖B' − B‖² + μ D(B')` is, per layer,

        B' = B (I + μ q M)⁻¹,    q = (s / ‖W‖_𝓕)² / L,    for `G_δ = I`,

    and in the eigenvectors of `G_δ` as well as of M otherwise; μ is the smallest that meets the limit, found by halves. What protected
    inputs excite is taken back and the rest is left to the task: of all updates within the limit, it is the one that changes
    least of what was learned.

    Args:
        drift (`RelativeDrift`):
            D, with its metrics.
        factors (`Sequence[LoraFactors]`):
            Factors of all layers.
        inputs (`Sequence[InputSide]`):
            What the form reads of their A.
        limit (`Tensor`):
            Largest D, a scalar.
        continued (`bool`, *optional*, defaults to `False`):
            Whether the second half of each factor is where a continued adapter started, which stays: A may have moved so far that
            no B is within the limit, and the nearest to it is found.

    Returns:
        `list[Tensor]`: what to add to B of every layer (to its first half, of a continued adapter), in float32; zero where D is
        within the limit or no number.
    """
    present = drift.value(inputs, drift.output_grams(factors)).mean()
    solved = [
        (group, *_coordinates(group, [factors[i] for i in group.indices], side, len(factors), continued))
        for group, side in zip(drift.groups, inputs, strict=True)
    ]
    sums = [part.sums().to(present.device) for *_, parts in solved for part in parts]
    mu = _smallest(torch.cat(sums, 1), present, limit.to(present.device))
    over = present.isfinite() & (present > limit.to(present.device))
    found = [present] * len(factors)
    for group, B, U, parts in solved:
        nearest = torch.stack([part.nearest(mu.to(B.device)) for part in parts]).sum(0) @ U.mT
        for index, value in zip(group.indices, torch.where(over.to(B.device), nearest - B, 0), strict=True):
            found[index] = value
    return found


def _coordinates(
    group: LayerGroup, factors: Sequence[LoraFactors], side: InputSide, num_layers: int, continued: bool
) -> tuple[Tensor, Tensor, list[_Coordinates]]:
    """B of a group, the eigenvectors of its M, and its coordinates in those of `G_δ`."""
    B, G = torch.stack([factor.B for factor in factors]).float(), group.kept.output
    r = B.shape[-1] // 2 if continued else B.shape[-1]
    M = side.gram.nan_to_num(0, 0, 0)
    # On the CPU where the GPU is Apple's, which has no eigh.
    M_r = M[:, :r, :r]
    m, U = (t.to(M) for t in torch.linalg.eigh(M_r.cpu() if M.device.type == "mps" else M_r))
    moved, fixed, m = B[..., :r] @ U, -(B[..., r:] @ M[:, r:, :r]) @ U, m.clamp_min(0)[:, None]
    q = ((group.scaling / group.kept.weight_norm.float()) ** 2 / num_layers)[:, None, None]
    if G is None:
        return B[..., :r], U, [_Coordinates(None, q, q * m, moved, fixed)]
    E, inside, outside = G.eigenvectors.float(), q * G.eigenvalues.float()[..., None], q * G.remainder[:, None, None]
    of_G = _Coordinates(E, inside, inside * m, E.mT @ moved, E.mT @ fixed)
    rest = _Coordinates(None, outside, outside * m, moved - E @ of_G.moved, fixed - E @ of_G.fixed)
    return B[..., :r], U, [of_G, rest]


def _smallest(sums: Tensor, present: Tensor, limit: Tensor) -> Tensor:
    """The smallest μ whose D is within a limit: D falls with μ, is at most `Σ y² / 4μ` of a new adapter, and at last hardly changes."""
    q, stiffness, yy, yc, cc = sums
    tiny = torch.finfo(q.dtype).tiny

    def fallen(mu: Tensor) -> Tensor:
        damping = 1 / (1 + mu * stiffness)
        squares = damping.square() * (yy + 2 * mu * q * yc + (mu * q).square() * cc)
        return (stiffness * squares - 2 * q * damping * (yc + mu * q * cc)).sum()

    constant = present - fallen(torch.zeros_like(present))
    low = (1e-7 / stiffness.max().clamp_min(tiny)).log()
    softest = torch.where(stiffness > 0, stiffness, torch.inf).min().clamp(tiny, 1 / tiny)
    high = torch.maximum((yy.sum() / (4 * limit)).clamp_min(tiny), 1e4 / softest).log()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        within = constant + fallen(middle.exp()) <= limit
        low, high = torch.where(within, low, middle), torch.where(within, middle, high)
    return high.exp()
