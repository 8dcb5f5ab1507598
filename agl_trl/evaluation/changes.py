"""How much prompts can say of a change: p-values against a limit, intervals, and what could have been shown at all."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import inf, nan
from typing import NamedTuple, Protocol

import numpy as np

from ..artifacts.extras import needs_extra


LEVEL = 0.05  # of a test, and of either end of an interval
POWER = 0.8  # at which a change counts as one that the prompts could have shown
RESAMPLES = 4999
_NUISANCES = (
    np.sin(np.linspace(0, np.pi / 2, 128)) ** 2
)  # where among the possible shares the worst case is looked for
_BLOCK = 2**20  # numbers resampled at a time
_TOLERANCE = 5e-4  # of the ends of an interval, and of the smallest change shown


class Change(Protocol):
    """A change on prompts that stand for all prompts of their kind; [`PairedRates`] or [`PairedMeans`]."""

    @property
    def asked(self) -> int:
        """Number of prompts it was measured on."""

    @property
    def unasked(self) -> int:
        """Number of prompts that were not asked, whatever they would have said."""

    @property
    def value(self) -> float:
        """The change on these prompts; NaN where there are none."""

    def p_above(self, limit: float) -> float:
        """P-value of the test that the true change is at most `limit`: small where it is above."""

    def p_below(self, limit: float) -> float:
        """P-value of the test that the true change is at least `limit`: small where it is below."""

    def interval(self) -> tuple[float, float]:
        """Ends that the true change is above, and below, each with 95 % confidence."""

    def shown_above(self, limit: float, level: float) -> float | None:
        """
        Smallest true change above `limit` for which `p_above` is at most `level` in 80 % of all samples of as many prompts;
        `None` where no change would do.
        """

    def shown_below(self, limit: float, level: float) -> float | None:
        """The same below `limit`, for `p_below`."""


class PairedRates(NamedTuple):
    """
    Change of a rate, from two answers to every prompt: share of prompts that changed one way minus share that changed back.

    The test is exact for any number of prompts: the p-value is the largest probability of a score as large as the one seen,
    over all shares of prompts that may change back. The score is Tango's (1998); for the limit 0 it is McNemar's.

    Args:
        there (`int`):
            Prompts that changed.
        back (`int`):
            Prompts that changed the other way.
        total (`int`):
            All prompts.
        may_there, may_back (`int`, *optional*, defaults to `0`):
            Of these, prompts that were not asked, and may change either way. A test takes the worst case for what it is to
            show: so its p-value is at least the one that all answers would give.
    """

    there: int
    back: int
    total: int
    may_there: int = 0
    may_back: int = 0

    @property
    def unasked(self) -> int:
        return self.may_there + self.may_back

    @property
    def asked(self) -> int:
        return self.total - self.unasked

    @property
    def value(self) -> float:
        return (self.there - self.back) / self.asked if self.asked else nan

    @property
    def mirrored(self) -> "PairedRates":
        """The same with the other sign."""
        return PairedRates(self.back, self.there, self.total, self.may_back, self.may_there)

    def p_above(self, limit: float) -> float:
        return _p_above(self.there, self.back + self.may_back, self.total, limit)

    def p_below(self, limit: float) -> float:
        return self.mirrored.p_above(-limit)

    def interval(self) -> tuple[float, float]:
        return self._lower(), -self.mirrored._lower()

    def _lower(self) -> float:
        low, high = -1.0, (self.there - self.back - self.may_back) / self.total
        while high - low > _TOLERANCE:
            middle = (low + high) / 2
            low, high = (middle, high) if self.p_above(middle) <= LEVEL else (low, middle)
        return low

    def shown_above(self, limit: float, level: float) -> float | None:
        if not -1 < limit < 1:
            return None
        least = _least_there(self.total, limit, _critical_score(self.total, limit, level))
        back = np.array([self.back / self.total])  # as many change back as did
        low, high = max(limit, -back.item()), 1 - 2 * back.item()
        if high <= low or _probability(least, self.total, high + back, back).item() < POWER:
            return None
        while high - low > _TOLERANCE:
            middle = (low + high) / 2
            enough = _probability(least, self.total, middle + back, back).item() >= POWER
            low, high = (low, middle) if enough else (middle, high)
        return high

    def shown_below(self, limit: float, level: float) -> float | None:
        shown = self.mirrored.shown_above(-limit, level)
        return None if shown is None else -shown


@lru_cache(4096)
def _p_above(there: int, back: int, total: int, limit: float) -> float:
    if limit >= 1:
        return 1.0
    if limit <= -1:
        return 0.0 if there - back > limit * total else 1.0
    score = _score(np.array(there), np.array(back), total, limit).item()
    return _size(total, limit, score - 1e-9)


def _score(there: np.ndarray, back: np.ndarray, total: int, limit: float) -> np.ndarray:
    """Tango's score: distance of the change from the limit in its standard errors, which are those at the limit."""
    # Likeliest share that changes back where the true change is the limit: root of a quadratic equation.
    b = (2 * total - there + back) * limit - there - back
    share = (np.sqrt(b**2 + 8 * total * back * limit * (1 - limit)) - b) / (4 * total)
    variance = total * (2 * share + limit * (1 - limit))
    distance = there - back - total * limit
    return np.divide(distance, np.sqrt(variance), out=np.zeros_like(variance), where=variance > 0)


def _least_there(total: int, limit: float, score: float) -> np.ndarray:
    """Fewest prompts that must change for such a score, for every number that changes back; of shape `(total + 1,)`."""
    back = np.arange(total + 1)
    low, high = np.full(total + 1, -1), total - back + 1  # the score rises with the number that changes
    while (high - low > 1).any():
        middle = np.maximum((low + high) // 2, 0)
        enough = _score(middle, back, total, limit) >= score
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return high


def _probability(least: np.ndarray, total: int, there: np.ndarray, back: np.ndarray) -> np.ndarray:
    """Probability that at least `least` prompts change, where they do so, and back, with these probabilities."""
    with needs_extra("report", "Tests of refusal rates"):
        from scipy.stats import binom

    counts, back, there = np.arange(total + 1), back[:, None], there[:, None]
    reached = binom.sf(least - 1, total - counts, np.clip(there / (1 - back), 0, 1))
    return (binom.pmf(counts, total, back) * reached).sum(1)


def _size(total: int, limit: float, score: float) -> float:
    """Largest probability of a score as large as this one, where the true change is the limit."""
    least, start = max(0.0, -limit), (1 - limit) / 2
    back = least + (start - least) * _NUISANCES[:-1]
    return float(_probability(_least_there(total, limit, score), total, back + limit, back).max())


def _critical_score(total: int, limit: float, level: float) -> float:
    """Smallest score that is significant."""
    low, high = 0.0, _score(np.array(total), np.array(0), total, limit).item() + 1
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if _size(total, limit, middle) <= level else (middle, high)
    return high


@dataclass(frozen=True)
class PairedMeans:
    """
    Mean of a figure over prompts, such as a KL or a difference of two likelihoods.

    The test is the bootstrap of Student's t (seeded). It follows the long tail that a KL has, which Student's own t does not.

    Args:
        values (`np.ndarray`):
            Figure of every prompt, of shape `(prompts,)`.
        unasked (`int`, *optional*, defaults to `0`):
            Prompts that were not asked, whose figure may be anything: with any of them nothing is shown.
    """

    values: np.ndarray
    unasked: int = 0

    @property
    def asked(self) -> int:
        return len(self.values)

    @property
    def value(self) -> float:
        return float(self.values.mean()) if len(self.values) else nan

    @cached_property
    def _error(self) -> float:
        """Standard error; infinite where there is no telling."""
        return float(self.values.std(ddof=1)) / len(self.values) ** 0.5 if len(self.values) > 1 else inf

    @cached_property
    def _resampled(self) -> np.ndarray:
        """Distances of resampled means from the mean, each in its own standard errors."""
        rng, count = np.random.default_rng(0), len(self.values)
        means, errors = [], []
        for block in range(0, RESAMPLES, size := max(1, _BLOCK // count)):
            drawn = self.values[rng.integers(0, count, (min(size, RESAMPLES - block), count))]
            means.append(drawn.mean(1))
            errors.append(drawn.std(1, ddof=1) / count**0.5)
        with np.errstate(divide="ignore", invalid="ignore"):
            distances = (np.concatenate(means) - self.value) / np.concatenate(errors)
        return np.nan_to_num(distances, nan=0.0, posinf=inf, neginf=-inf)

    def p_above(self, limit: float) -> float:
        if self.unasked or len(self.values) < 2:
            return 1.0
        if self._error == 0:  # the same on every prompt
            return 0.0 if self.value > limit else 1.0
        as_far = (self._resampled >= (self.value - limit) / self._error).sum()
        return float(1 + as_far) / (1 + RESAMPLES)

    def p_below(self, limit: float) -> float:
        return PairedMeans(-self.values, self.unasked).p_above(-limit)

    def interval(self) -> tuple[float, float]:
        if self.unasked or len(self.values) < 2:
            return -inf, inf
        if self._error == 0:
            return self.value, self.value
        low, high = np.quantile(self._resampled, (LEVEL, 1 - LEVEL), method="closest_observation")
        return self.value - float(high) * self._error, self.value - float(low) * self._error

    def shown_above(self, limit: float, level: float) -> float | None:
        if len(self.values) < 2:
            return None
        with needs_extra("report", "Tests of means"):
            from scipy.stats import t

        return limit + float(t.isf(level, len(self.values) - 1) + t.ppf(POWER, len(self.values) - 1)) * self._error

    def shown_below(self, limit: float, level: float) -> float | None:
        shown = PairedMeans(-self.values, self.unasked).shown_above(-limit, level)
        return None if shown is None else -shown
