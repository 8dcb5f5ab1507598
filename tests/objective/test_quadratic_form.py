import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from agl_trl.objective.covariance import LowRankCovariance
from agl_trl.objective.quadratic_form import (
    LayerMetric,
    LoraFactors,
    RelativeDrift,
    dense_quadratic_form,
    grouped,
    quadratic_form,
)
from tests.helpers import reference
from tests.helpers.reference import D_IN, R, case, dense_metric, low_rank


@pytest.mark.parametrize("with_output", [False, True])
def test_factored_form_equals_dense_float64(with_output):
    A, B, metric = case(with_output)
    expected = reference.quadratic_form(0.7 * B @ A, *dense_metric(metric))
    assert quadratic_form(A, B, 0.7, metric).item() == pytest.approx(expected.item(), rel=1e-10)
    assert dense_quadratic_form(0.7 * B @ A, metric).item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("with_output", [False, True])
def test_form_depends_on_the_product_alone(with_output):
    """Invariant to any invertible change of (B, A) that leaves BA alone, and to how the scale is shared with s."""
    A, B, metric = case(with_output)
    change = torch.randn(R, R, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    value = quadratic_form(A, B, 1.0, metric)
    torch.testing.assert_close(
        quadratic_form(torch.linalg.inv(change) @ A, B @ change, 1.0, metric), value, rtol=1e-8, atol=0
    )
    torch.testing.assert_close(quadratic_form(A, B / 4, 4.0, metric), value, rtol=1e-10, atol=0)


@pytest.mark.parametrize("with_output", [False, True])
def test_gradcheck_and_finite_gradient_at_zero(with_output):
    A, B, metric = case(with_output)
    A.requires_grad_(), B.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: quadratic_form(a, b, 0.5, metric), (A, B))

    zero = torch.zeros_like(B, requires_grad=True)
    value = quadratic_form(A, zero, 0.5, metric)
    gradients = torch.autograd.grad(value, (A, zero))
    assert value == 0 and all(torch.isfinite(g).all() for g in gradients) and gradients[0].abs().max() == 0


def test_activation_metric_is_the_mean_squared_change_of_the_output():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, D_IN, generator=generator, dtype=torch.float64)
    A, B, _ = case(False)
    values, vectors = torch.linalg.eigh(x.T @ x / 200)
    metric = LayerMetric(
        LowRankCovariance(vectors, values, torch.zeros((), dtype=torch.float64)), None, torch.tensor(1.0)
    )
    expected = (x @ (B @ A).T).square().sum(1).mean()
    assert quadratic_form(A, B, 1.0, metric).item() == pytest.approx(expected.item(), rel=1e-10)


def test_batched_drift_equals_layer_by_layer():
    """Layers of different shapes, ranks and scalings, interleaved: one value each, in the order given."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(10, 14, 3), (6, 14, 3), (10, 14, 3), (14, 8, 2), (10, 14, 5)]
    factors, metrics = [], []
    for seed, (d_out, d_in, r) in enumerate(shapes):
        factors.append(
            LoraFactors(
                torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator), 0.5 + seed
            )
        )
        output = low_rank(d_out, 4, seed, torch.float32).shrunk(0.1)
        metrics.append(LayerMetric(low_rank(d_in, 5, seed + 10, torch.float32), output, torch.tensor(1.0 + seed)))
    drifts = RelativeDrift(grouped(metrics, factors))(factors)
    for drift, factor, metric in zip(drifts, factors, metrics, strict=True):
        delta = (factor.scaling * factor.B @ factor.A).double()
        expected = reference.quadratic_form(delta, *dense_metric(metric)) / metric.weight_norm.double() ** 2
        assert drift.item() == pytest.approx(expected.item(), rel=1e-5)


def test_layers_that_read_one_input_keep_one_copy_of_its_eigenvectors():
    """In the type they came in; what is computed with is float32 and the same as without sharing."""
    generator = torch.Generator().manual_seed(0)
    X = [low_rank(14, 5, seed, torch.float32) for seed in (0, 1)]
    X = [one._replace(eigenvectors=one.eigenvectors.bfloat16()) for one in X]
    metrics = [LayerMetric(one, None, torch.tensor(2.0)) for one in (X[0], X[0], X[1], X[0], X[1])]
    factors = [
        LoraFactors(torch.randn(3, 14, generator=generator), torch.randn(d_out, 3, generator=generator), 0.5)
        for d_out in (10, 6, 10, 10, 6)
    ]
    groups = grouped(metrics, factors)
    assert len(groups) == 2 and groups[0].kept.input.eigenvectors is groups[1].kept.input.eigenvectors
    assert groups[0].kept.input.eigenvectors.shape == (2, 14, 5)
    assert groups[0].kept.input.eigenvectors.dtype == torch.bfloat16
    apart = [LayerMetric(LowRankCovariance(*(t.float() for t in m.input)), None, m.weight_norm) for m in metrics]
    assert torch.equal(RelativeDrift(groups)(factors), RelativeDrift(grouped(apart, factors))(factors))


class _Indexing(TorchFunctionMode):
    """Indices by other operations: the usual one asks a driver, which a CPU has none of."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        tensor, index = args
        dim = 0
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, int):
                tensor = tensor.select(dim, part)
                continue
            if part is None:
                tensor = tensor.unsqueeze(dim)
            elif isinstance(part, torch.Tensor):
                tensor = tensor.index_select(dim, part)
            dim += 1
        return tensor


@pytest.mark.parametrize("of_first_layer", [True, False])
def test_gradients_of_layers_on_several_devices(of_first_layer):
    """Tensors without numbers, which refuse to be put together from two devices, as real ones do."""
    devices = ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    with FakeTensorMode(), _Indexing():
        factors, metrics = [], []
        for device in devices:
            X = LowRankCovariance(
                torch.rand(14, 5, device=device), torch.rand(5, device=device), torch.rand((), device=device)
            )
            metrics.append(LayerMetric(X, None, torch.rand((), device=device)))
            factors.append(LoraFactors(torch.rand(3, 14, device=device), torch.rand(10, 3, device=device), 0.5))
        drift = RelativeDrift(grouped(metrics, factors))
        inputs, outputs = drift.input_sides(factors), drift.output_grams(factors)
        value = drift.value(inputs, outputs).mean()
        weight = torch.ones((), device=value.device) if of_first_layer else 1.0
        gradients = drift.gradients(factors, inputs, outputs, weight)
    assert value.device == torch.device("cuda:0")
    assert [str(gradient.device) for gradient in gradients] == [d for device in devices for d in (device, device)]
    assert [gradient.shape for gradient in gradients[:2]] == [(3, 14), (10, 3)]
