"""The drift budget: kept exactly in every type a weight may have, and a multiplier that follows its recursion."""

import pytest
import torch

from agl_trl.objective.budget import DUAL_RATE, DriftBudget


def drift_of(Bs: list[torch.Tensor]) -> torch.Tensor:
    """A drift as it is of B, quadratic, in float64 from what is stored."""
    return sum(B.double().square().sum() for B in Bs) / 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_budget_is_kept_in_the_precision_of_the_weights(dtype):
    """Of many numbers, whose roundings average out, and of one alone, where nothing does: one of hundreds would overshoot."""
    generator = torch.Generator().manual_seed(0)
    for shapes, draws in ((((40, 8), (24, 8)), 50), (((1, 1),), 1500)):
        for _ in range(draws):
            budget = 10 ** (3 * torch.rand((), generator=generator).item() - 4)
            Bs = [(20 + 20 * torch.rand(shape, generator=generator)).to(dtype) for shape in shapes]
            assert drift_of(Bs) > budget
            DriftBudget(budget, torch.device("cpu")).after_step(drift_of(Bs).float(), Bs)
            # Rounded down, but by no more than a few steps of the type.
            assert budget * (1 - 12 * torch.finfo(dtype).eps) < drift_of(Bs).item() <= budget


def test_update_below_the_budget_is_left_bit_for_bit():
    B = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    kept = B.clone()
    DriftBudget(2 * drift_of([B]).item(), torch.device("cpu")).after_step(drift_of([B]).float(), [B])
    assert torch.equal(B, kept)


def test_multiplier_follows_its_recursion_and_has_no_gradient():
    budget, expected = DriftBudget(0.5, torch.device("cpu"), multiplier=0.2), 0.2
    for drift in (0.9, 0.1, 0.0, 0.0, 0.0, 2.0, 0.5):
        budget.after_step(torch.tensor(drift, dtype=torch.float64), [torch.ones(2)])
        expected = max(0.0, expected + DUAL_RATE * min(1.0, drift / 0.5 - 1))
        assert budget.multiplier.item() == pytest.approx(expected, abs=1e-12)
    drift = torch.tensor(0.8, requires_grad=True)
    penalty = budget.penalty(drift)
    (gradient,) = torch.autograd.grad(penalty, drift)
    assert penalty.item() == pytest.approx(expected * 0.8 / 0.5) and gradient.item() == pytest.approx(expected / 0.5)
    assert not budget.multiplier.requires_grad
