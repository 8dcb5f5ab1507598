"""KL to a reference: against dense figures, the step that brings it down, and the scale that holds it."""

import math

import pytest
import torch

from agl_trl.objective.kl import kl_of_row, largest_scale, projection_step, top_k_kl


def distributions(positions: int = 6, size: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(positions, size, generator=generator, dtype=torch.float64)
    moved = logits + 0.5 * torch.randn(positions, size, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1), moved.log_softmax(-1)


@pytest.mark.parametrize("k", [1, 5, 39, 40])
def test_kl_of_the_kept_tokens_is_the_dense_one_or_a_lower_bound(k):
    reference, tuned = distributions()
    top = reference.topk(k)
    found = top_k_kl(top.indices, top.values, tuned)
    dense = (reference.exp() * (reference - tuned)).sum(1)
    if k >= 39:  # the one token that is not kept is the rest
        torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-6)
    else:
        assert (found <= dense).all() and (found > 0).all() and (found < dense - 1e-3).any()
        coarse = torch.stack([part.gather(1, top.indices).exp().sum(1) for part in (reference, tuned)])
        kept = top.values, tuned.gather(1, top.indices)
        rest = [1 - total for total in coarse]
        by_hand = (kept[0].exp() * (kept[0] - kept[1])).sum(1) + rest[0] * (rest[0] / rest[1]).log()
        torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize("k", [4, 40])
def test_kl_at_the_reference_is_zero_with_a_finite_gradient_of_zero(k):
    reference, _ = distributions()
    logits = reference.clone().requires_grad_()
    top = reference.topk(k)
    found = top_k_kl(top.indices, top.values, logits.log_softmax(-1))
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert found.abs().max() < 1e-12 and gradient.abs().max() < 1e-6
    one = torch.full((1, 40), -1000.0).index_fill(1, torch.tensor([3]), 0.0).requires_grad_()  # nothing is left over
    top = one.detach().log_softmax(-1).topk(k)
    found = top_k_kl(top.indices, top.values, one.log_softmax(-1))
    (gradient,) = torch.autograd.grad(found.sum(), one)
    assert found.abs().max() < 1e-6 and gradient.isfinite().all()


def test_a_row_counts_half_by_its_first_five_tokens():
    per_token = torch.arange(20.0)
    assert kl_of_row(per_token).item() == pytest.approx(0.5 * 9.5 + 0.5 * 2.0)
    assert kl_of_row(per_token[:3]).item() == pytest.approx(1.0), "a short answer is its own beginning"


FAR = torch.tensor(1e9)


def test_linearised_kl_reaches_the_aim():
    kl, norm = torch.tensor(0.3), torch.tensor(2.5)
    eta = projection_step(kl, 0.05, norm, FAR)
    assert (kl - eta * norm**2).item() == pytest.approx(0.05)


@pytest.mark.parametrize("aim", [1e-9, 0.01, 0.4])
def test_on_a_quadratic_it_goes_half_way_at_most(aim):
    x = torch.tensor([0.6, -0.8])  # at distance 1, where k is 0.5
    eta = projection_step(0.5 * x.square().sum(), aim, x.norm(), FAR)
    left = (x - eta * x).norm().item()
    assert 0.5 <= left < 1 and 0.5 * left**2 >= aim
    assert eta.item() == pytest.approx(0.5 - aim)


@pytest.mark.parametrize(
    ("kl", "norm"),
    [
        (0.01, 1.0),
        (0.02, 1.0),
        (math.nan, 1.0),
        (math.inf, 1.0),
        (0.5, math.nan),
        (0.5, math.inf),
        (math.nan, math.nan),
        (0.5, 0.0),
    ],
)
def test_no_step_within_the_aim_or_where_a_number_is_none(kl, norm):
    assert projection_step(torch.tensor(kl), 0.02, torch.tensor(norm), torch.tensor(1.0)).item() == 0


def test_no_step_is_longer_than_the_radius():
    eta = projection_step(torch.tensor(50.0), 0.02, torch.tensor(1e-4), torch.tensor(0.3))
    assert (eta * 1e-4).item() == pytest.approx(0.3)
    assert projection_step(torch.tensor(50.0), 0.02, torch.tensor(1.0), torch.tensor(0.0)).item() == 0


def staircase(scale: float) -> float:
    return 0.25 * math.floor(13 * scale)


def wavy(scale: float) -> float:
    return 3 * scale * (1 + 0.4 * math.sin(25 * scale))


def broken_at_one(value: float):
    return lambda scale: value if scale > 0.7 else 9 * scale**2


CURVES = {
    "quadratic": lambda scale: 40 * scale**2,
    "hardly above": lambda scale: 1.01 * scale**2,
    "far above": lambda scale: 1e5 * scale**2,
    "power 1.3": lambda scale: 17 * scale**1.3,
    "power 6": lambda scale: 300 * scale**6,
    "non-monotone": wavy,
    "NaN at 1": broken_at_one(math.nan),
    "infinite at 1": broken_at_one(math.inf),
}


def asked(curve) -> tuple[float, list[float]]:
    scales: list[float] = []

    def excess(scale: float) -> float:
        scales.append(scale)
        return curve(scale)

    return largest_scale(excess), scales


@pytest.mark.parametrize("name", CURVES)
def test_scale_leaves_the_measure_right_below_its_limit(name):
    scale, scales = asked(CURVES[name])
    assert 0.95 <= CURVES[name](scale) <= 1 and 0 < scale < 1
    assert scales[0] == 1 and scales[-1] == scale, "the model is left at the scale that is told"
    assert len(scales) <= 13


def test_quadratic_forms_take_two_questions():
    assert len(asked(CURVES["quadratic"])[1]) == 2


def test_scale_at_a_jump_is_right_below_it():
    scale, scales = asked(staircase)  # 1 until 5/13, and then 1.25
    assert staircase(scale) <= 1 and scales[-1] == scale
    scale, scales = asked(lambda scale: 0.3 if scale < 0.37 else 8.0)
    assert 0.35 < scale < 0.37 and scales[-1] == scale


def test_what_is_within_its_limit_stays_whole():
    for measure in (0.0, 0.4, 1.0, -1e-9):
        assert asked(lambda scale, measure=measure: measure) == (1.0, [1.0])


@pytest.mark.parametrize("measure", [1.5, math.nan, math.inf])
def test_zero_where_there_is_none(measure):
    scale, scales = asked(lambda scale: measure)
    assert scale == 0 and len(scales) == 13
