"""The nearest weights within a limit on the drift, against the conditions that make them the nearest; and what the limit learns."""

import math

import pytest
import torch

from agl_trl.objective.quadratic_form import LayerMetric, LoraFactors, RelativeDrift, grouped
from agl_trl.objective.trust_region import LARGEST_STEP, SMOOTHING, TrustRegion, step_within
from tests.helpers import reference
from tests.helpers.reference import dense_metric, low_rank


SHAPES = [(10, 14, 4), (6, 14, 4), (10, 14, 4), (14, 8, 2)]


def layers(with_output: bool, continued: bool = False):
    """Factors and metrics of layers of several shapes; where continued, the second half of each factor is the start."""
    generator = torch.Generator().manual_seed(0)
    factors, metrics = [], []
    for seed, (d_out, d_in, r) in enumerate(SHAPES):
        A, B = torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)
        if continued:
            A[r // 2 :] = A[: r // 2] + 0.1 * A[r // 2 :]
        factors.append(LoraFactors(A, B, 1.0 if continued else 0.5 + seed))
        output = low_rank(d_out, 4, seed, torch.float32).shrunk(0.2) if with_output else None
        metrics.append(LayerMetric(low_rank(d_in, 5, seed + 10, torch.float32), output, torch.tensor(1.0 + seed)))
    return factors, metrics


def dense_drift(factors, metrics):
    """Mean relative drift by dense matrices, float64."""
    total = torch.zeros((), dtype=torch.float64)
    for (A, B, s), metric in zip(factors, metrics, strict=True):
        delta = s * B.double() @ A.double()
        total = total + reference.quadratic_form(
            delta, *dense_metric(metric)
        ) / metric.weight_norm.double() ** 2 / len(factors)
    return total


def nearest(factors, metrics, limit, continued=False):
    drift = RelativeDrift(grouped(metrics, factors))
    inputs = drift.input_sides(factors)
    steps = step_within(drift, factors, inputs, torch.tensor(limit), continued=continued)
    padded = [
        torch.nn.functional.pad(step, (0, f.B.shape[1] - step.shape[1]))
        for f, step in zip(factors, steps, strict=True)
    ]
    return [f._replace(B=f.B + step) for f, step in zip(factors, padded, strict=True)]


@pytest.mark.parametrize("with_output", [False, True])
@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("share", [0.9, 0.3, 0.01])
def test_it_ends_at_the_limit_along_one_multiple_of_the_gradient(with_output, continued, share):
    """D is convex in B: at the limit, with `B − B' = μ ∂D/∂B' / 2` for one μ of all layers, no other B is as near."""
    factors, metrics = layers(with_output, continued)
    start = dense_drift(factors, metrics).item()
    floor = 0.0
    if continued:  # what is left of D when B is free: A moved, too
        floor = dense_drift(nearest(factors, metrics, 1e-9, continued=True), metrics).item()
        assert 0 < floor < start
    limit = floor + share * (start - floor)
    moved = nearest(factors, metrics, limit, continued)
    assert dense_drift(moved, metrics).item() == pytest.approx(limit, rel=2e-4)

    free = [f.B[:, : f.B.shape[1] // (2 if continued else 1)].double().requires_grad_() for f in moved]
    joined = [f._replace(B=torch.cat([b, f.B[:, b.shape[1] :].double()], 1)) for f, b in zip(moved, free, strict=True)]
    gradients = torch.autograd.grad(dense_drift(joined, metrics), free)
    taken = [f.B[:, : b.shape[1]].double() - b.detach() for f, b in zip(factors, free, strict=True)]
    g, t = torch.cat([x.flatten() for x in gradients]), torch.cat([x.flatten() for x in taken])
    assert torch.dot(g, t) / (g.norm() * t.norm()) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("continued", [False, True])
def test_what_is_within_stays_to_the_last_bit(continued):
    factors, metrics = layers(True, continued)
    limit = dense_drift(factors, metrics).item() * 1.01
    for before, after in zip(factors, nearest(factors, metrics, limit, continued), strict=True):
        assert torch.equal(before.B, after.B)


def test_weights_that_are_no_number_stay_and_stop_nothing():
    factors, metrics = layers(False)
    factors[1].B[0, 0] = torch.nan
    for before, after in zip(factors, nearest(factors, metrics, 1e-3), strict=True):
        assert torch.equal(before.B.nan_to_num(7), after.B.nan_to_num(7))
    factors, metrics = layers(False)
    factors[1].A[0, 0] = torch.inf
    for before, after in zip(factors, nearest(factors, metrics, 1e-3), strict=True):
        assert torch.equal(before.B, after.B)


def test_what_protected_inputs_do_not_excite_is_left_to_the_task():
    """X sees one direction of the input alone: the update within it goes, the other stays."""
    X = reference.LowRankCovariance(torch.eye(6)[:, :1], torch.tensor([1.0]), torch.tensor(0.0))
    factors = [LoraFactors(torch.eye(6)[:2], torch.ones(5, 2), 1.0)]
    (moved,) = nearest(factors, [LayerMetric(X, None, torch.tensor(1.0))], 0.05)
    torch.testing.assert_close(moved.B[:, 1], torch.ones(5))
    torch.testing.assert_close(moved.B[:, 0], torch.full((5,), 0.1))


def test_limit_follows_what_a_drift_is_measured_to_cost():
    region = TrustRegion(2.0, torch.tensor(100.0))
    assert region.limit().item() == pytest.approx(0.02)
    region.observe(torch.tensor(0.8), torch.tensor(0.002))  # four times as dear
    assert region.share_per_drift.item() == pytest.approx(100 * 4**SMOOTHING)
    region.observe(torch.tensor(1e9), torch.tensor(0.002))  # no farther than a bounded step
    assert region.share_per_drift.item() == pytest.approx(100 * 4**SMOOTHING * math.exp(SMOOTHING * LARGEST_STEP))


@pytest.mark.parametrize(
    "share, drift", [(float("nan"), 0.1), (float("inf"), 0.1), (0.0, 0.1), (-1e-9, 0.1), (0.5, 0.0)]
)
def test_a_measurement_that_says_nothing_changes_nothing(share, drift):
    region = TrustRegion(2.0, torch.tensor(100.0))
    region.observe(torch.tensor(share), torch.tensor(drift))
    assert region.share_per_drift.item() == 100
