"""Collision terms against dense float64 matrices, alive where the docs say so and dead where they say so."""

import pytest
import torch

from agl_trl.objective import collision
from agl_trl.objective.alignguard import AlignGuardObjective, Coefficients
from agl_trl.objective.collision import FrozenWeights, geodesic_separation, riemannian_overlap
from agl_trl.objective.decomposition import Update, critical_mask, inner, project, subtract
from agl_trl.objective.quadratic_form import LayerMetric
from tests.helpers.reference import guarded_layers


ENERGY = 0.7
SHAPE = dict(beta=4.0, threshold=1.0, width=0.25)


def separation(aligned: Update, task: Update, metric: LayerMetric) -> torch.Tensor:
    products = inner(aligned, task, metric), inner(aligned, aligned, metric), inner(task, task, metric)
    return geodesic_separation(*products, metric.weight_norm)


def parts_of_the_first_layer() -> tuple[Update, Update, Update, FrozenWeights, torch.Tensor]:
    """ΔW, ΔW_A and ΔW_T, the frozen weight, all with a leading layer dimension, and the parameter B."""
    factors, metrics, _, _, frozen = guarded_layers(False)
    update = Update(factors[0].A[None], factors[0].scaling * factors[0].B[None])
    metric = metrics[0]._replace(input=type(metrics[0].input)(*(t[None] for t in metrics[0].input)))
    aligned = project(update, metric, critical_mask(metrics[0], ENERGY)[None])
    one = FrozenWeights(frozen.rows[:1], frozen.rms[:1], frozen.squared_norm[:1])
    return update, aligned, subtract(update, aligned), one, factors[0].B


def test_separation_is_the_squared_cosine_between_0_and_1():
    """Of one direction 1, of orthogonal ones 0, and between them the cosine of vectors; finite where nothing moved."""
    one, other = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])
    norm = torch.tensor(1.0)
    for u, v, expected in ((one, 2 * one, 1.0), (one, torch.tensor([4.0, -3.0]), 0.0), (one, other, 0.36)):
        value = geodesic_separation(u @ v, u @ u, v @ v, norm)
        assert value.item() == pytest.approx(expected, rel=1e-6, abs=1e-12) and value <= 1
    zero = torch.zeros(2, requires_grad=True)
    value = geodesic_separation(zero @ zero, zero @ zero, zero @ zero, norm)
    (gradient,) = torch.autograd.grad(value, zero)
    assert value == 0 and torch.isfinite(gradient).all()


@pytest.mark.parametrize("with_output", [False, True])
def test_geodesic_term_is_dead_under_the_complement_and_alive_with_the_task_subspace(with_output):
    factors, metrics, task_metrics, _, frozen = guarded_layers(with_output)
    for factor, metric, task_metric in zip(factors, metrics, task_metrics, strict=True):
        update = Update(factor.A.double(), factor.scaling * factor.B.double())
        double = LayerMetric(
            metric.input.to(torch.float64), metric.output and metric.output.to(torch.float64), metric.weight_norm
        )
        other = LayerMetric(
            task_metric.input.to(torch.float64),
            task_metric.output and task_metric.output.to(torch.float64),
            metric.weight_norm,
        )
        aligned = project(update, double, critical_mask(double, ENERGY))
        for shared in (
            double,
            double._replace(input=double.input._replace(eigenvalues=double.input.eigenvalues.flip(0))),
        ):
            dead = separation(aligned, subtract(update, aligned), shared)
            assert abs(dead.item()) < 1e-12
            assert all(
                g.abs().max() < 1e-8 for g in torch.autograd.grad(dead, [factor.A, factor.B], retain_graph=True)
            )
        alive = separation(aligned, project(update, other, critical_mask(other, ENERGY)), double)
        assert alive.item() > 1e-6, "six orders of magnitude above what is called dead here"
    coefficients = Coefficients(alignment=2.0, task=0.5, collision=1.0, alpha=0.5, fisher_energy=ENERGY)
    complement = AlignGuardObjective(coefficients, metrics, factors, None, frozen)(factors)
    assert "geodesic" not in complement


@pytest.mark.parametrize("beta", [0.0, 4.0])
def test_overlap_equals_dense_float64(beta):
    """β = 0 weighs all coordinates alike; the larger β, the more where the weight is large."""
    update, aligned, task, weights, _ = parts_of_the_first_layer()
    with torch.no_grad():
        delta, critical, other = ((part.B @ part.A).double()[0] for part in (update, aligned, task))
    W = weights.rows[0](torch.arange(10)).double()
    eta = 1 + beta * torch.sigmoid(((W + delta).abs() / W.square().mean().sqrt() - 1.0) / 0.25)
    expected = (eta * (critical * other).abs()).sum() / W.square().sum()
    value = riemannian_overlap(update, aligned, task, weights, **SHAPE | dict(beta=beta))
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_small_blocks_change_neither_the_overlap_nor_its_gradient(monkeypatch):
    *parts, B = parts_of_the_first_layer()
    whole = riemannian_overlap(*parts, **SHAPE)
    (gradient,) = torch.autograd.grad(whole, B, retain_graph=True)
    monkeypatch.setattr(collision, "BLOCK_ELEMENTS", {"cpu": 40})
    blocks = riemannian_overlap(*parts, **SHAPE)
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(torch.autograd.grad(blocks, B, retain_graph=True)[0], gradient)


def test_sampled_rows_are_unbiased():
    *parts, _ = parts_of_the_first_layer()
    samples = [riemannian_overlap(*parts, **SHAPE, rows=torch.tensor([i])).item() for i in range(10)]
    assert len(set(samples)) == 10
    assert sum(samples) / 10 == pytest.approx(riemannian_overlap(*parts, **SHAPE).item(), rel=1e-5)
