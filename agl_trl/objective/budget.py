"""The drift budget: a limit on the relative drift that training keeps, step by step. Imports torch alone."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


DUAL_RATE = 0.1
LARGEST_MULTIPLIER = 100.0


class DriftBudget:
    """
    Keeps the mean relative drift D at or below a budget b.

    Two mechanisms, both on the device and without a host sync:

    - a multiplier ν between 0 and 100, raised while a step overshoots and lowered while there is room (dual ascent on
      `D/b ≤ 1`), `ν ← ν + κ min(D/b − 1, 1)`, whose penalty `ν D/b` turns the optimizer towards the directions that cost least;
      it rises no faster than it falls, so that one step far off is forgotten after one with room;
    - after every step, if D > b, `B ← B·√(b/D)`, which makes "at or below" exact, because D is quadratic in B.

    A drift that is not finite says nothing: multiplier and weights stay as they are.

    Args:
        budget (`float`):
            b, dimensionless, above 0.
        device (`torch.device`):
            Where the multiplier lives.
        multiplier (`float`, *optional*, defaults to `0.0`):
            Initial ν, to continue a run.
    """

    def __init__(self, budget: float, device: torch.device, multiplier: float = 0.0):
        self.budget = budget
        # The largest float32 at or below b: 1e-3 itself rounds up.
        limit = torch.tensor(budget, dtype=torch.float32)
        limit = limit if limit.item() <= budget else torch.nextafter(limit, torch.zeros(()))
        self.limit = limit.to(device)
        start = min(multiplier, LARGEST_MULTIPLIER)  # of a run that is continued, from before there was a largest
        self.multiplier = torch.tensor(start, dtype=torch.float64 if device.type == "cpu" else torch.float32).to(
            device
        )

    def weight(self) -> Tensor:
        """`ν/b`, what D is weighed with, a float32 scalar."""
        return (self.multiplier / self.budget).float()

    def penalty(self, drift: Tensor) -> Tensor:
        """`ν D/b`, a scalar; ν itself receives no gradient."""
        return (self.multiplier * drift / self.budget).to(drift.dtype)

    @torch.no_grad()
    def after_step(self, drift: Tensor, Bs: Sequence[Tensor]) -> None:
        """
        Update the multiplier and shrink an update that overshot.

        Args:
            drift (`Tensor`):
                D of the weights after the step, a scalar.
            Bs (`Sequence[Tensor]`):
                `lora_B` weights of all guarded layers, changed in place.
        """
        finite = drift.isfinite()
        excess = (drift / self.budget - 1).clamp(-1, 1).where(finite, torch.zeros_like(drift))
        self.multiplier.add_(DUAL_RATE * excess).clamp_(0, LARGEST_MULTIPLIER)
        shrink = (self.limit / drift.clamp_min(torch.finfo(drift.dtype).tiny)).sqrt()
        kinds: dict[tuple, list[Tensor]] = defaultdict(list)
        for B in Bs:
            kinds[B.device, B.dtype].append(B)
        for (device, dtype), alike in kinds.items():
            # Rounded down in the precision of B, and two steps more, so that rounding can't end above the budget.
            below = (shrink * (1 - 2 * torch.finfo(dtype).eps)).to(device, dtype)
            below = torch.nextafter(below, torch.zeros_like(below))
            factor = torch.where((finite & (drift > self.limit)).to(device), below, torch.ones_like(below))
            torch._foreach_mul_(alike, factor)  # as torch's own optimizers: one call, whatever the number of layers
