"""The objective as published, against its formulas with dense float64 matrices."""

import pytest
import torch

from agl_trl.objective.paper import ALIGNMENT, ALPHA, BETA, COLLISION, TASK, THRESHOLD, PaperObjective
from agl_trl.objective.quadratic_form import LoraFactors
from tests.helpers.reference import guarded_layers, low_rank


def outputs_of(factors: list[LoraFactors]):
    return [low_rank(len(factor.B), 4, seed, torch.float32) for seed, factor in enumerate(factors)]


def test_terms_equal_dense_float64():
    factors, *_ = guarded_layers(False)
    outputs = outputs_of(factors)
    expected = dict.fromkeys(("alignment", "task", "riemannian"), 0.0)
    for factor, G in zip(factors, outputs, strict=True):
        delta = (factor.scaling * factor.B @ factor.A).detach().double()
        U = G.eigenvectors.double()
        aligned = U @ U.T @ delta
        expected["alignment"] += sum(
            value * (u @ delta).square().sum() for value, u in zip(G.eigenvalues.double(), U.T, strict=True)
        )
        expected["task"] += (delta - aligned).square().sum()
        eta = 1 + BETA * torch.sigmoid(delta.abs() - THRESHOLD)
        expected["riemannian"] += (eta * (aligned * (delta - aligned)).abs()).sum()
    terms = PaperObjective(outputs, factors)(factors)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-4), name
    assert abs(terms["geodesic"].item()) < 1e-9, "the parts are orthogonal"
    collision = ALPHA * expected["riemannian"]
    total = ALIGNMENT * expected["alignment"] + TASK * expected["task"] + COLLISION * collision
    assert terms["penalty"].item() == pytest.approx(total.item(), rel=1e-4)


def test_nothing_moved_is_zero_with_finite_gradients():
    factors, *_ = guarded_layers(False)
    zero = [LoraFactors(f.A, torch.zeros_like(f.B, requires_grad=True), f.scaling) for f in factors]
    terms = PaperObjective(outputs_of(factors), zero)(zero)
    assert all(value == 0 for value in terms.values())
    gradients = torch.autograd.grad(terms["penalty"], [t for f in zero for t in f[:2]])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
