"""The scaling law of forgetting: how much loss on the old distribution rises with fine-tuning tokens and model size."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..artifacts.extras import needs_extra


with needs_extra("report", "Fits of the scaling law"):  # told when the command starts, before any run is made
    from scipy.optimize import least_squares


BOUNDS = {"A": (0.0, np.inf), "alpha": (-1.0, 3.0), "beta": (0.0, 3.0), "E": (-np.inf, np.inf)}
STARTS = [(alpha, beta) for alpha in (0.1, 0.5, 1.0) for beta in (0.2, 0.5, 1.0)]
FLOOR = 0.05  # share of the largest increase below which errors are not taken relative to the increase


class Runs(NamedTuple):
    """
    Fine-tuning runs of one method, all arrays of shape `(runs,)`.

    Args:
        n_params (`ndarray`):
            Parameters N of the model.
        tokens (`ndarray`):
            Fine-tuning tokens D_ft.
        increase (`ndarray`):
            ΔL: loss on the old distribution after minus before, in nats per token.
    """

    n_params: np.ndarray
    tokens: np.ndarray
    increase: np.ndarray

    def where(self, chosen: np.ndarray) -> "Runs":
        """The runs that a mask or indices choose."""
        return Runs(*(column[chosen] for column in self))


class Law(NamedTuple):
    """Coefficients of `ΔL = A · D_ft^β / N^α + E`; A in nats · params^α / token^β, E in nats."""

    A: float
    alpha: float
    beta: float
    E: float

    def increase(self, n_params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """ΔL that the law tells, in nats."""
        return self.A * tokens**self.beta / n_params**self.alpha + self.E


class Fit(NamedTuple):
    """
    A fitted law and how far it can be trusted.

    Args:
        law ([`Law`]):
            Coefficients.
        intervals (`dict[str, tuple[float, float]]`):
            Percentile-bootstrap 95 % interval of every coefficient.
        relative_error (`float`):
            Mean of `|ΔL_fit − ΔL| / |ΔL|` over the runs it was fitted to.
        held_out_error (`float`):
            The same over runs of a model size that the fit did not see, each size in turn; NaN with fewer than three sizes,
            or if those left are too few to fit.
        held_out_point_error (`float`):
            The same over runs of a size and token count that the fit did not see together, each pair in turn; NaN if
            those left are too few to fit.
        doubts (`list[str]`):
            A sentence for every coefficient that the runs do not determine.
    """

    law: Law
    intervals: dict[str, tuple[float, float]]
    relative_error: float
    held_out_error: float
    held_out_point_error: float
    doubts: list[str]


def fit_law(runs: Runs, starts: Sequence[tuple[float, float]] = STARTS) -> Law:
    """
    Bounded least squares of `ΔL = A · D_ft^β / N^α + E` (AlignGuard-LoRA, scaling law; the form of Bethune et al., 2025,
    without injection) from several starts, on errors relative to the increase.

    With one model size α is 0 and with one token count β is 0: nothing tells them from A.

    Args:
        runs ([`Runs`]):
            At least as many runs as coefficients that vary.
        starts (`Sequence[tuple[float, float]]`, *optional*):
            Pairs (α, β) to start from; the best end counts.

    Raises:
        `ValueError`: If there are too few runs, or a figure is not finite or not positive.
    """
    N, D, y = (np.asarray(column, dtype=np.float64) for column in runs)
    if not (np.isfinite(y).all() and (N > 0).all() and (D > 0).all()):
        raise ValueError("Sizes and token counts must be above 0, and losses finite.")
    varies = {"alpha": len(np.unique(N)) > 1, "beta": len(np.unique(D)) > 1}
    if len(y) < 2 + sum(varies.values()):
        raise ValueError(f"{len(y)} runs can't determine {2 + sum(varies.values())} coefficients: give more.")
    # In units of the geometric means, so that A is the increase of a typical run and the four are of like size.
    n, d = N / np.exp(np.log(N).mean()), D / np.exp(np.log(D).mean())
    scale = np.abs(y).max() or 1.0
    weight = 1 / (np.abs(y) + FLOOR * scale)

    def terms(x: np.ndarray) -> tuple[np.ndarray, float, float]:
        alpha, beta = x[2] * varies["alpha"], x[3] * varies["beta"]
        return d**beta / n**alpha, alpha, beta

    def residuals(x: np.ndarray) -> np.ndarray:
        return weight * (scale * (x[0] * terms(x)[0] + x[1]) - y)

    low = [0.0, -np.inf, BOUNDS["alpha"][0], BOUNDS["beta"][0]]
    high = [np.inf, np.inf, BOUNDS["alpha"][1], BOUNDS["beta"][1]]
    tries = [
        least_squares(residuals, [max(y.mean() / scale, 1e-3), 0.0, *start], bounds=(low, high), x_scale="jac")
        for start in starts
    ]
    best = min(tries, key=lambda outcome: outcome.cost).x
    _, alpha, beta = terms(best)
    amplitude = scale * best[0] * np.exp(alpha * np.log(N).mean() - beta * np.log(D).mean())
    return Law(float(amplitude), float(alpha), float(beta), float(scale * best[1]))


def fit(runs: Runs, *, resamples: int = 200, seed: int = 0) -> Fit:
    """
    Fit the law with bootstrap intervals, its error on sizes it has not seen, and what the runs leave open.

    Args:
        runs ([`Runs`]):
            Runs of one method.
        resamples (`int`, *optional*, defaults to `200`):
            Bootstrap resamples of runs.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resamples.

    Raises:
        `ValueError`: As in [`fit_law`].
    """
    law = fit_law(runs)
    generator = np.random.default_rng(seed)
    laws = []
    for _ in range(resamples):
        chosen = generator.integers(0, len(runs.increase), len(runs.increase))
        try:
            laws.append(fit_law(runs.where(chosen), [law[1:3]]))  # near the whole fit: one start is enough
        except ValueError:  # a resample with too few different runs
            continue
    intervals = {
        name: (float(low), float(high))
        for name in Law._fields
        for low, high in [np.percentile([getattr(one, name) for one in laws], [2.5, 97.5])]
    }
    sizes, of_size = np.unique(runs.n_params, return_inverse=True)
    _, of_point = np.unique(np.stack([runs.n_params, runs.tokens]), axis=1, return_inverse=True)
    by_size = _held_out(runs, of_size, STARTS) if len(sizes) >= 3 else float("nan")
    by_point = _held_out(runs, of_point.ravel(), [law[1:3]])
    whole = float(relative_errors(law, runs).mean())
    return Fit(law, intervals, whole, by_size, by_point, _doubts(runs, law, intervals))


def _held_out(runs: Runs, groups: np.ndarray, starts: Sequence[tuple[float, float]]) -> float:
    """Mean relative error over the runs of every group, each told by a fit to the others; NaN if they are too few."""
    if len(groups) - np.bincount(groups).max() < len(Law._fields):
        return float("nan")
    errors = [
        relative_errors(fit_law(runs.where(groups != group), starts), runs.where(groups == group))
        for group in np.unique(groups)
    ]
    return float(np.concatenate(errors).mean())


def relative_errors(law: Law, runs: Runs) -> np.ndarray:
    """`|ΔL_fit − ΔL| / |ΔL|` of every run."""
    return np.abs(law.increase(runs.n_params, runs.tokens) - runs.increase) / np.abs(runs.increase).clip(1e-12)


def _doubts(runs: Runs, law: Law, intervals: dict[str, tuple[float, float]]) -> list[str]:
    doubts = []
    if len(np.unique(runs.n_params)) == 1:
        doubts.append("α is not identifiable: all runs are of one model size (it is set to 0, and A holds its share).")
    if len(np.unique(runs.tokens)) == 1:
        doubts.append("β is not identifiable: all runs have one token count (it is set to 0, and A holds its share).")
    for name, symbol in (("alpha", "α"), ("beta", "β")):
        low, high = intervals[name]
        if high - low > 1:
            doubts.append(f"{symbol} is hardly identifiable: its 95 % interval goes from {low:.2g} to {high:.2g}.")
    low, high = intervals["A"]
    if low <= 0 or high > 100 * low:
        doubts.append(
            f"A is hardly identifiable: its 95 % interval goes from {low:.2g} to {high:.2g}; it moves with α and β."
        )
    low, high = intervals["E"]
    if high - low > np.ptp(runs.increase):
        doubts.append(
            f"E is hardly identifiable: its 95 % interval, {low:.2g} to {high:.2g}, is wider than the increases are apart."
        )
    return doubts


def typical_increase(law: Law, runs: Sequence[Runs]) -> float:
    """ΔL that a law tells for the geometric mean of sizes and tokens: amplitudes of methods with other exponents compare there."""
    n_params, tokens = (np.concatenate([getattr(one, name) for one in runs]) for name in ("n_params", "tokens"))
    centre = (np.exp(np.log(column).mean()) for column in (n_params, tokens))
    return float(law.increase(*(np.array(value) for value in centre)))
