"""Every term of the objective against dense float64 matrices, alive where the docs say so, and dead where they say so."""

from dataclasses import replace

import pytest
import torch

from agl_trl.objective.alignguard import AlignGuardObjective, Coefficients
from agl_trl.objective.decomposition import Update, critical_mask, inner, project, subtract
from agl_trl.objective.quadratic_form import LayerMetric, LoraFactors
from tests.helpers import reference
from tests.helpers.reference import dense, guarded_layers, low_rank


ENERGY = 0.7


BASE = Coefficients(alignment=2.0, task=0.5, fisher_energy=ENERGY)


def expected_terms(c: Coefficients, factors, metrics, task_metrics, weights) -> dict[str, float]:
    """The formulas, one layer at a time, with dense float64 matrices."""
    lines = []
    for factor, metric, task_metric, W in zip(factors, metrics, task_metrics, weights, strict=True):
        delta = (factor.scaling * factor.B @ factor.A).detach().double()
        X, G = dense(metric.input), None if metric.output is None else dense(metric.output)
        scale = metric.weight_norm.double() ** 2
        aligned = reference.projected(delta, metric.input, metric.output, c.fisher_energy)
        complement = delta - aligned
        task = complement
        line = {"relative_drift": reference.quadratic_form(delta, X, G) / scale}
        line["alignment"] = reference.quadratic_form(aligned, X, G) / scale
        if c.task_subspace == "task":
            task = reference.projected(delta, task_metric.input, task_metric.output, c.fisher_energy)
            neither = complement - reference.projected(
                complement, task_metric.input, task_metric.output, c.fisher_energy
            )
            line["neither"] = reference.quadratic_form(neither, X, G) / scale
        if c.task_metric == "rest":
            outside = task - reference.projected(task, metric.input, metric.output, c.fisher_energy)
            line["task"] = reference.quadratic_form(outside, X, G) / scale
        elif c.task_metric == "identity":
            line["task"] = task.square().sum() * torch.trace(X) / len(X) / scale
        else:
            G_task = None if task_metric.output is None else dense(task_metric.output)
            line["task"] = reference.quadratic_form(task, dense(task_metric.input), G_task) / scale
        W = W.double()
        if c.collision > 0 and c.alpha > 0:
            rms = W.square().mean().sqrt()
            eta = 1 + c.beta * torch.sigmoid(((W + delta).abs() / rms - c.threshold) / c.width)
            line["riemannian"] = (eta * (aligned * task).abs()).sum() / W.square().sum()
        if c.needs_geodesic:
            left = aligned if G is None else G @ aligned
            product = torch.trace(left.T @ task @ X)
            norms = reference.quadratic_form(aligned, X, G) * reference.quadratic_form(task, X, G)
            line["geodesic"] = product**2 / norms
        lines.append(line)
    return {name: sum(line[name].item() for line in lines) / len(lines) for name in lines[0]}


CASES = {
    "two weights": BASE,
    "identity": replace(BASE, task_metric="identity"),
    "task metric": replace(BASE, task_metric="task"),
    "task subspace": replace(BASE, task_subspace="task"),
    "task subspace and metric": replace(BASE, task_subspace="task", task_metric="task"),
    "overlap": replace(BASE, collision=0.3, alpha=1.0),
    "all": replace(BASE, task_subspace="task", collision=0.3, alpha=0.5),
}


@pytest.mark.parametrize("with_output", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_terms_equal_dense_float64_and_are_alive(name, with_output):
    c = CASES[name]
    factors, metrics, task_metrics, weights, frozen = guarded_layers(with_output)
    objective = AlignGuardObjective(c, metrics, factors, task_metrics, frozen)
    terms = objective(factors)
    expected = expected_terms(c, factors, metrics, task_metrics, weights)
    assert set(terms) == {*expected, "penalty"}
    for term, value in expected.items():
        assert terms[term].item() == pytest.approx(value, rel=2e-4), term
        gradients = torch.autograd.grad(terms[term], [factors[0].A, factors[0].B], retain_graph=True)
        assert all(g.abs().max() > 0 for g in gradients), f"the gradient of {term} is dead"
    weight = {"alignment": c.alignment, "task": c.task, "neither": c.alignment}
    weight |= {"riemannian": c.collision * c.alpha, "geodesic": c.collision * (1 - c.alpha)}
    total = sum(weight[term] * value for term, value in expected.items() if term != "relative_drift")
    assert terms["penalty"].item() == pytest.approx(total, rel=2e-4)


@pytest.mark.parametrize("with_output", [False, True])
def test_equal_weights_and_the_rest_of_the_metric_are_the_complete_form(with_output):
    """λ_T = λ_A with H the rest of 𝓕 is λ_A ‖ΔW‖²_𝓕: to 1e-10 in float64."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        A = torch.randn(3, 14, generator=generator, dtype=torch.float64)
        B = torch.randn(10, 3, generator=generator, dtype=torch.float64)
        output = low_rank(10, 4, seed).shrunk(0.2) if with_output else None
        metric = LayerMetric(low_rank(14, 5, seed), output, torch.tensor(1.0, dtype=torch.float64))
        update = Update(A, B)
        aligned = project(update, metric, critical_mask(metric, ENERGY))
        rest = subtract(update, aligned)
        parts = inner(aligned, aligned, metric) + inner(rest, rest, metric)
        assert parts.item() == pytest.approx(inner(update, update, metric).item(), rel=1e-10)
    factors, metrics, *_ = guarded_layers(with_output)
    complete = AlignGuardObjective(replace(BASE, task=2.0), metrics, factors)(factors)
    split = AlignGuardObjective(replace(BASE, task=2.0 + 1e-7), metrics, factors)(factors)
    assert set(complete) == {"relative_drift", "penalty"}, "the decomposition costs nothing when it is not needed"
    assert split["penalty"].item() == pytest.approx(complete["penalty"].item(), rel=1e-5)


def test_all_terms_are_zero_with_finite_gradients_at_the_reference_weights():
    factors, metrics, task_metrics, _, frozen = guarded_layers(True)
    zero = [LoraFactors(f.A, torch.zeros_like(f.B, requires_grad=True), f.scaling) for f in factors]
    terms = AlignGuardObjective(CASES["all"], metrics, zero, task_metrics, frozen)(zero)
    assert all(value == 0 for value in terms.values())
    gradients = torch.autograd.grad(terms["penalty"], [t for f in zero for t in f[:2]])
    assert all(torch.isfinite(g).all() for g in gradients)


def test_terms_do_not_depend_on_how_the_update_is_factored():
    """A change of basis between B and A, or of the scaling, leaves every term as it is."""
    factors, metrics, task_metrics, _, frozen = guarded_layers(True)
    change = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1))).Q
    turned = [LoraFactors(change.T @ f.A, f.B @ change * f.scaling / 4, 4.0) for f in factors]
    c = CASES["all"]
    one = AlignGuardObjective(c, metrics, factors, task_metrics, frozen)(factors)
    other = AlignGuardObjective(c, metrics, turned, task_metrics, frozen)(turned)
    for name, value in one.items():
        assert other[name].item() == pytest.approx(value.item(), rel=1e-3), name
