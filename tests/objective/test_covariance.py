import pytest
import torch
from torch.overrides import TorchFunctionMode

from agl_trl.objective.covariance import EXACT_UP_TO, CovarianceSketch, sketch_matrix
from tests.helpers.reference import dense, low_rank, shrunk


def decaying_rows(n: int, dim: int, rank: int, seed: int = 0) -> torch.Tensor:
    """Rows whose covariance has `rank` large directions over small isotropic noise."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, rank, generator=generator)).Q
    scales = torch.logspace(1, 0, rank)
    return torch.randn(n, rank, generator=generator) * scales @ basis.T + 0.01 * torch.randn(
        n, dim, generator=generator
    )


def streamed(rows: torch.Tensor, batch_size: int, rank: int, omega=None) -> CovarianceSketch:
    sketch = CovarianceSketch(rows.shape[1], omega)
    for batch in rows.split(batch_size):
        sketch.update(batch)
    return sketch


def test_exact_covariance_equals_brute_force():
    rows = decaying_rows(300, 24, 6)
    expected = rows.double().T @ rows.double() / 300
    full = streamed(rows, 7, 24).covariance(24)
    torch.testing.assert_close(dense(full), expected, rtol=1e-5, atol=1e-6)

    truncated = streamed(rows, 7, 6).covariance(6)
    eigenvalues = torch.linalg.eigvalsh(expected).flip(0)
    torch.testing.assert_close(truncated.eigenvalues.double(), eigenvalues[:6], rtol=1e-5, atol=1e-6)
    # The sums are float32: the small eigenvalues carry its rounding of the large ones.
    torch.testing.assert_close(truncated.remainder.double(), eigenvalues[6:].mean(), rtol=1e-2, atol=0)
    torch.testing.assert_close(truncated.trace().double(), torch.trace(expected), rtol=1e-5, atol=0)


def test_operations_equal_dense_ones():
    covariance = low_rank(12, 4, seed=1)
    rows = torch.randn(5, 12, dtype=torch.float64)
    matrix = dense(covariance)
    torch.testing.assert_close(covariance.gram(rows), rows @ matrix @ rows.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(covariance.row_forms(rows), (rows @ matrix @ rows.T).diagonal(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(covariance.trace(), torch.trace(matrix), rtol=1e-10, atol=0)
    for shrinkage in (0.0, 0.3, 1.0):
        torch.testing.assert_close(
            dense(covariance.shrunk(shrinkage)), shrunk(matrix, shrinkage), rtol=1e-10, atol=1e-12
        )


def test_shrunk_covariance_has_mean_eigenvalue_one_even_when_it_is_zero():
    zero = low_rank(8, 3, seed=0)._replace(
        eigenvalues=torch.zeros(3, dtype=torch.float64), remainder=torch.tensor(0.0, dtype=torch.float64)
    )
    torch.testing.assert_close(dense(zero.shrunk(0.1)), torch.eye(8, dtype=torch.float64))
    assert low_rank(8, 3, seed=0).shrunk(0.2).trace().item() == pytest.approx(8)


@pytest.mark.parametrize("wide", [False, True])
def test_batch_size_and_rank_split_change_nothing_beyond_rounding(wide):
    dim, rank = (EXACT_UP_TO + 76, 8) if wide else (40, 8)
    rows = decaying_rows(200, dim, rank)
    omega = sketch_matrix(dim, rank, seed=3)
    assert (omega is not None) == wide
    one = streamed(rows, 200, rank, omega).covariance(rank)
    small = streamed(rows, 3, rank, omega).covariance(rank)
    halves = [streamed(half, 16, rank, omega) for half in (rows[:90], rows[90:])]
    halves[0].sums += halves[1].sums
    halves[0].trace += halves[1].trace
    halves[0].count += halves[1].count
    probe = torch.randn(6, dim, generator=torch.Generator().manual_seed(9))
    for other in (small, halves[0].covariance(rank)):
        torch.testing.assert_close(other.eigenvalues, one.eigenvalues, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.gram(probe), one.gram(probe), rtol=1e-3, atol=1e-3)


def test_sketch_finds_the_leading_eigenpairs_and_keeps_the_trace():
    dim, rank = EXACT_UP_TO + 76, 16
    rows = decaying_rows(400, dim, rank)
    covariance = streamed(rows, 32, rank, sketch_matrix(dim, rank, seed=0)).covariance(rank)
    expected = rows.double().T @ rows.double() / 400
    eigenvalues, eigenvectors = torch.linalg.eigh(expected)
    # Tropp et al. (2017), theorem 4.1: the expected error in trace norm, for a sketch of twice the rank.
    bound = (1 + rank / (rank - 1)) * eigenvalues[:-rank].sum()
    error = (eigenvalues.flip(0)[:rank] - covariance.eigenvalues).abs()
    assert error.sum() < bound and error.max() < 0.01
    torch.testing.assert_close(covariance.trace().double(), torch.trace(expected), rtol=1e-4, atol=0)
    overlap = (covariance.eigenvectors.double().T @ eigenvectors.flip(1)[:, :rank]).square().sum() / rank
    assert overlap > 0.999
    gram = covariance.eigenvectors.T @ covariance.eigenvectors
    torch.testing.assert_close(gram, torch.eye(rank), rtol=0, atol=1e-5)


def test_sketch_of_fewer_rows_than_columns_and_of_zeros_stays_finite():
    dim, rank = EXACT_UP_TO + 76, 16
    omega = sketch_matrix(dim, rank, seed=0)
    few = streamed(decaying_rows(3, dim, 2), 1, rank, omega).covariance(rank)
    assert all(torch.isfinite(tensor).all() for tensor in few)
    rows = decaying_rows(3, dim, 2)
    probe = rows[:2]
    torch.testing.assert_close(few.gram(probe), probe @ (rows.T @ rows / 3) @ probe.T, rtol=2e-2, atol=1e-2)
    zero = streamed(torch.zeros(4, dim), 4, rank, omega).covariance(rank)
    assert zero.trace() == 0 and torch.isfinite(zero.eigenvectors).all()


@pytest.mark.parametrize("wide", [False, True])
def test_sums_are_float32_where_the_model_computes_in_16_bit(wide):
    """The hooks that call it run inside the model's forward pass, and with `bf16=True` inside autocast."""
    dim = EXACT_UP_TO + 64 if wide else 48
    rows, omega = torch.randn(32, dim, generator=torch.Generator().manual_seed(0)), sketch_matrix(dim, 16, 0)
    plain, cast = CovarianceSketch(dim, omega), CovarianceSketch(dim, omega)
    plain.update(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast.update(rows)
    assert cast.sums.dtype == torch.float32 and torch.equal(cast.sums, plain.sums)


class Watch(TorchFunctionMode):
    """Notes in what precision a GPU would multiply, at every product that is added to the sums."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.addmm_:
            self.seen.append(torch.backends.cuda.matmul.fp32_precision)
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.__version__ < "2.9", reason="precisions have no names")
def test_sums_are_float32_where_the_trainer_rounds_factors(monkeypatch):
    """`tf32=True` of transformers sets the precision of everything; it is back afterwards, also after a failure."""
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")
    sketch = CovarianceSketch(4)
    with Watch() as watch:
        sketch.update(torch.ones(2, 4))
        with pytest.raises(RuntimeError):
            sketch.update(torch.ones(2, 5))
    assert watch.seen == ["ieee", "ieee"] and torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_sketch_matrix_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    sketch_matrix(EXACT_UP_TO + 1, 4, seed=1)
    assert torch.equal(before, torch.get_rng_state())
