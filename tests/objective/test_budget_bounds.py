"""The drift budget: a multiplier that falls as fast as it rises and that nothing poisons, and weights scaled back."""

import pytest
import torch

from agl_trl.objective.budget import DUAL_RATE, LARGEST_MULTIPLIER, DriftBudget


CPU = torch.device("cpu")


def test_multiplier_rises_while_a_step_overshoots_and_falls_while_there_is_room():
    budget, B = DriftBudget(1.0, CPU), torch.ones(3)
    budget.after_step(torch.tensor(1.75), [B])
    assert budget.multiplier.item() == pytest.approx(0.075)
    assert B[0].item() == pytest.approx(1.75**-0.5, rel=1e-3) and B[0] < 1.75**-0.5
    budget.after_step(torch.tensor(0.5), [B])
    assert budget.multiplier.item() == pytest.approx(0.025) and B[0].item() == pytest.approx(1.75**-0.5, rel=1e-3)
    drift = torch.tensor(0.8, requires_grad=True)
    (gradient,) = torch.autograd.grad(budget.penalty(drift), drift)
    assert gradient.item() == pytest.approx(0.025)
    for _ in range(9):
        budget.after_step(torch.tensor(0.0), [B])
    assert budget.multiplier.item() == 0 and torch.isfinite(B).all()


@pytest.mark.parametrize("times", [4.0, 100.0, 1e30])
def test_a_step_far_off_is_forgotten_after_one_with_room(times):
    budget, B = DriftBudget(1e-3, CPU), torch.ones(3, dtype=torch.float64)
    budget.after_step(torch.tensor(1e-3 * times), [B])
    assert budget.multiplier.item() == pytest.approx(DUAL_RATE)
    assert B[0].item() == pytest.approx(times**-0.5, rel=1e-5), (
        "the weights are held at once, however far off they were"
    )
    budget.after_step(torch.tensor(0.0), [B])
    assert budget.multiplier.item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("drift", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_drift_that_is_not_finite_changes_nothing(drift, dtype):
    budget, B = DriftBudget(1.0, CPU, multiplier=0.3), torch.tensor([2.0, torch.inf, 0.0], dtype=dtype)
    for _ in range(3):
        budget.after_step(torch.tensor(drift), [B])
    assert budget.multiplier.item() == pytest.approx(0.3) and budget.weight().item() == pytest.approx(0.3)
    assert B.tolist() == [2.0, torch.inf, 0.0], "and makes no NaN of an infinity"
    B = torch.ones(3, dtype=dtype)
    budget.after_step(torch.tensor(4.0), [B])
    assert budget.multiplier.item() == pytest.approx(0.4) and 0.49 < B[0].item() <= 0.5, "the next step counts"


def test_multiplier_has_a_largest_value():
    budget = DriftBudget(1.0, CPU, multiplier=1e6)
    assert budget.multiplier.item() == LARGEST_MULTIPLIER
    budget.after_step(torch.tensor(9.0), [])
    assert budget.multiplier.item() == LARGEST_MULTIPLIER
    budget.after_step(torch.tensor(0.0), [])
    assert budget.multiplier.item() == pytest.approx(LARGEST_MULTIPLIER - DUAL_RATE)


def test_budget_is_kept_where_its_float32_rounds_up():
    """float32(1e-3) is above 1e-3: a drift of exactly that is over the budget."""
    budget, B = DriftBudget(1e-3, CPU), torch.ones(3)
    drift = torch.tensor(1e-3, dtype=torch.float32)
    assert drift.item() > 1e-3
    budget.after_step(drift, [B])
    assert (drift.double() * B[0].double() ** 2).item() <= 1e-3 and B[0] > 0.999999
