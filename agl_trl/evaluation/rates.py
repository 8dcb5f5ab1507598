"""Rates with their intervals, and the test they come from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..artifacts.extras import needs_extra


def binomial_test() -> Callable[..., Any]:
    """
    scipy's `binomtest`, which all intervals and p-values come from.

    Raises:
        [`MissingExtra`]: If scipy is not installed.
    """
    with needs_extra("report", "Intervals and tests of refusal rates"):
        from scipy.stats import binomtest

    return binomtest


@dataclass(frozen=True)
class Rate:
    """Share of `count` out of `total` with its Wilson 95 % interval."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        interval = binomial_test()(self.count, self.total).proportion_ci(method="wilson")
        return interval.low, interval.high
