"""The law of forgetting: known coefficients come back, and what runs leave open is said."""

import numpy as np
import pytest

from agl_trl.experiments.scaling_law import Law, Runs, fit, fit_law, relative_errors


LAW = Law(A=40.0, alpha=0.45, beta=0.3, E=0.02)
SIZES, TOKENS = (2e5, 1e6, 5e6), (1e4, 4e4, 1.6e5, 6.4e5)


def synthetic(law: Law, noise: float = 0.0, seed: int = 0, sizes=SIZES, tokens=TOKENS, repeats: int = 2) -> Runs:
    N, D = (a.ravel() for a in np.meshgrid(np.repeat(sizes, repeats), tokens))
    rng = np.random.default_rng(seed)
    return Runs(N, D, law.increase(N, D) * (1 + noise * rng.standard_normal(N.shape)))


def test_exact_data_gives_the_exact_law():
    found = fit_law(synthetic(LAW))
    assert found == pytest.approx(LAW, rel=1e-3)


def test_noisy_data_is_recovered_within_the_intervals():
    """Of 20 data sets the 95 % intervals hold each known coefficient in 17 or more."""
    covered = dict.fromkeys(LAW._fields, 0)
    for seed in range(20):
        found = fit(synthetic(LAW, noise=0.03, seed=seed, repeats=3), resamples=60)
        for name, (low, high) in found.intervals.items():
            covered[name] += low <= getattr(LAW, name) <= high
        assert 0 < found.relative_error < 0.04 and 0 < found.held_out_error < 0.15
        assert found.law.increase(np.array(1e6), np.array(1e5)) == pytest.approx(LAW.increase(1e6, 1e5), rel=0.05)
    assert min(covered.values()) >= 17, covered


def test_held_out_error_is_of_sizes_not_seen():
    """Sizes that do not follow a power law are fitted well together and foretold badly."""
    runs = synthetic(LAW)
    bent = Runs(runs.n_params, runs.tokens, runs.increase * np.where(runs.n_params == SIZES[1], 2.0, 1.0))
    found = fit(bent, resamples=20)
    assert found.held_out_error > 0.3
    by_hand = [
        relative_errors(fit_law(bent.where(bent.n_params != size)), bent.where(bent.n_params == size)).mean()
        for size in SIZES
    ]
    assert found.held_out_error == pytest.approx(np.mean(by_hand))


def test_what_is_not_identifiable_is_said():
    one_size = fit(synthetic(LAW, noise=0.02, sizes=(1e6,)), resamples=50)
    assert one_size.law.alpha == 0 and any("α is not identifiable" in doubt for doubt in one_size.doubts)
    assert np.isnan(one_size.held_out_error)
    one_count = fit(synthetic(LAW, noise=0.02, tokens=(1e5,)), resamples=50)
    assert one_count.law.beta == 0 and any("β is not identifiable" in doubt for doubt in one_count.doubts)
    flat = fit(synthetic(Law(0.0, 0.5, 0.5, 0.02), noise=0.05), resamples=50)
    assert any("identifiable" in doubt for doubt in flat.doubts)
    assert not fit(synthetic(LAW, noise=0.001, repeats=3), resamples=50).doubts


def test_too_little_is_refused():
    with pytest.raises(ValueError, match="3 runs can't determine 4 coefficients"):
        fit_law(Runs(np.array([1e5, 1e6, 1e6]), np.array([1e4, 1e4, 1e5]), np.array([0.1, 0.05, 0.1])))
    with pytest.raises(ValueError, match="must be above 0"):
        fit_law(Runs(np.array([0.0, 1, 2, 3]), np.ones(4), np.ones(4)))


def test_held_out_points_are_told_by_fits_that_did_not_see_them():
    runs = synthetic(LAW, noise=0.02, repeats=1)
    errors = [
        relative_errors(fit_law(runs.where(np.arange(12) != i)), runs.where(np.array([i]))).item() for i in range(12)
    ]
    assert fit(runs, resamples=10).held_out_point_error == pytest.approx(np.mean(errors), rel=1e-3)
    few = fit(runs.where(np.arange(4)), resamples=10)
    assert np.isnan(few.held_out_point_error) and np.isnan(few.held_out_error)
