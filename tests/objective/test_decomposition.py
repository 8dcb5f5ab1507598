"""Projections and inner products as factors, against dense float64 matrices."""

import pytest
import torch

from agl_trl.objective.decomposition import Update, critical_inner, critical_mask, inner, project, subtract
from agl_trl.objective.quadratic_form import quadratic_form
from tests.helpers import reference
from tests.helpers.reference import case, dense_metric


ENERGIES = [0.0, 0.3, 0.7, 0.95, 1.0]


def update_and_metric(with_output, seed=0):
    A, B, metric = case(with_output, seed)
    return Update(A, 0.7 * B), metric


def product(update: Update) -> torch.Tensor:
    return update.B @ update.A


@pytest.mark.parametrize("with_output", [False, True])
@pytest.mark.parametrize("energy", ENERGIES[1:])
def test_projection_equals_dense_brute_force(with_output, energy):
    update, metric = update_and_metric(with_output)
    expected = reference.projected(product(update), metric.input, metric.output, energy)
    projected = project(update, metric, critical_mask(metric, energy))
    torch.testing.assert_close(product(projected), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("with_output", [False, True])
@pytest.mark.parametrize("energy", ENERGIES)
def test_parts_add_up_are_orthogonal_and_projecting_twice_changes_nothing(with_output, energy):
    update, metric = update_and_metric(with_output)
    mask = critical_mask(metric, energy)
    aligned = project(update, metric, mask)
    task = subtract(update, aligned)
    torch.testing.assert_close(product(aligned) + product(task), product(update), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(product(project(aligned, metric, mask)), product(aligned), rtol=1e-9, atol=1e-10)
    total = inner(update, update, metric)
    assert inner(aligned, task, metric).abs() < 1e-10 * total
    parts = inner(aligned, aligned, metric) + inner(task, task, metric)
    assert parts.item() == pytest.approx(total.item(), rel=1e-10)


def test_critical_subspace_grows_with_its_share():
    update, metric = update_and_metric(True)
    aligned = [project(update, metric, critical_mask(metric, energy)) for energy in ENERGIES]
    values = [inner(part, part, metric).item() for part in aligned]
    assert values == sorted(values) and values[0] == 0 and values[1] < values[-1]


@pytest.mark.parametrize("with_output", [False, True])
def test_flat_spectrum_does_not_make_everything_critical(with_output):
    """Kept eigenpairs that hold little of the trace: all of them are critical, and the rest of the space is not."""
    update, metric = update_and_metric(with_output)
    flat = metric._replace(input=metric.input._replace(remainder=metric.input.eigenvalues[-1] * 0.999))
    mask = critical_mask(flat, 0.9)
    assert mask.all()
    aligned = project(update, flat, mask)
    assert 0 < inner(aligned, aligned, flat) < 0.9 * inner(update, update, flat)


@pytest.mark.parametrize("with_output", [False, True])
def test_inner_product_equals_dense(with_output):
    one, metric = update_and_metric(with_output)
    other, _ = update_and_metric(with_output, seed=3)
    X, G = dense_metric(metric)
    left = product(other) if G is None else G @ product(other)
    assert inner(one, other, metric).item() == pytest.approx(torch.trace(product(one).T @ left @ X).item(), rel=1e-10)
    assert inner(one, other).item() == pytest.approx((product(one) * product(other)).sum().item(), rel=1e-10)
    assert inner(one, one, metric).item() == pytest.approx(quadratic_form(one.A, one.B, 1.0, metric).item(), rel=1e-12)


@pytest.mark.parametrize("with_output", [False, True])
@pytest.mark.parametrize("energy", ENERGIES)
def test_critical_part_of_the_inner_product_equals_that_of_the_projections(with_output, energy):
    one, metric = update_and_metric(with_output)
    other, _ = update_and_metric(with_output, seed=3)
    mask = critical_mask(metric, energy)
    for left, right in ((one, other), (one, one)):
        expected = inner(project(left, metric, mask), project(right, metric, mask), metric).item()
        assert critical_inner(left, right, metric, mask).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_batched_over_layers():
    cases = [update_and_metric(True, seed) for seed in range(3)]
    masks = [critical_mask(metric, 0.7) for _, metric in cases]
    stacked = Update(torch.stack([u.A for u, _ in cases]), torch.stack([u.B for u, _ in cases]))
    metric = cases[0][1]
    fields = [
        type(metric.input)(*(torch.stack(p) for p in zip(*(getattr(m, side) for _, m in cases), strict=True)))
        for side in ("input", "output")
    ]
    batched = project(stacked, metric._replace(input=fields[0], output=fields[1]), torch.stack(masks))
    for line, ((update, metric), mask) in enumerate(zip(cases, masks, strict=True)):
        expected = product(project(update, metric, mask))
        torch.testing.assert_close(batched.B[line] @ batched.A[line], expected, rtol=1e-10, atol=1e-12)


def test_coordinates_of_eigenvectors_that_nobody_else_holds():
    """A temporary tensor often gets the id of the one before it: its coordinates are its own all the same."""
    update, _ = update_and_metric(False)
    for seed in range(50):
        torch.manual_seed(seed)
        expected = update.A @ torch.randn(update.A.shape[-1], 3, dtype=update.A.dtype)
        torch.manual_seed(seed)
        assert torch.equal(update.coordinates(torch.randn(update.A.shape[-1], 3, dtype=update.A.dtype)), expected)


def test_coordinates_are_multiplied_once():
    update, metric = update_and_metric(False)
    V = metric.input.eigenvectors
    assert update.coordinates(V) is update.coordinates(V)
