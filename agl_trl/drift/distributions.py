"""Distributions of KL and refusal margin over prompts, as bars to draw."""

from typing import NamedTuple

import numpy as np

from ..evaluation.behaviour import Behaviour


BINS = 24


class Series(NamedTuple):
    """One side of a distribution: heights of its bars from 0 to 1, and what is told of it."""

    label: str
    heights: list[float]
    median: float
    ninetieth: float
    largest: float


class Distribution(NamedTuple):
    """
    A figure over prompts.

    Args:
        title (`str`):
            What it is.
        unit (`str`):
            Of its numbers.
        note (`str`):
            What the bars leave out, or nothing.
        low, middle, high (`float`):
            Where the first bar starts, the middle is, and the last one ends.
        series (`list[Series]`):
            One, or before and after.
    """

    title: str
    unit: str
    note: str
    low: float
    middle: float
    high: float
    series: list[Series]


def distributions(answers: Behaviour) -> list[Distribution]:
    """KL and margin on unsafe and on safe prompts, as far as they were measured."""
    found = []
    for unsafe, kind in ((True, "unsafe"), (False, "safe")):
        chosen = answers.unsafe == unsafe
        kl = answers.kl_first_tokens[chosen].double().numpy()
        kl = kl[np.isfinite(kl)]
        if kl.size:
            found.append(_kl(f"KL, {kind} prompts", kl))
        margins = [side[chosen].double().numpy() for side in (answers.margin_base, answers.margin_tuned)]
        if all(side.size and np.isfinite(side).all() for side in margins):
            edges = np.linspace(min(map(np.min, margins)), max(map(np.max, margins)) + 1e-9, BINS + 1)
            heights = [np.histogram(side, edges)[0] for side in margins]
            top = max(map(np.max, heights))
            series = [
                _series(label, counts / top, side)
                for label, counts, side in zip(("before", "after"), heights, margins, strict=True)
            ]
            title = f"Refusal margin, {kind} prompts"
            found.append(Distribution(title, "nats", "", *_ends(edges), series))
    return found


def _kl(title: str, kl: np.ndarray) -> Distribution:
    """A KL has a long tail: its bars are of equal width in the logarithm."""
    above = kl[kl > 0]
    note = "" if above.size == kl.size else f"{kl.size - above.size} of {kl.size} prompts have a KL of exactly 0."
    if above.size == 0:
        return Distribution(title, "nats per token", note, 0.0, 0.0, 0.0, [_series("after", np.zeros(BINS), kl)])
    start = np.log10(above.min())
    edges = 10 ** np.linspace(start, max(np.log10(above.max()), start + 0.01) + 1e-9, BINS + 1)
    counts = np.histogram(above, edges)[0]
    return Distribution(
        title, "nats per token", note, *_ends(edges, log=True), [_series("after", counts / counts.max(), kl)]
    )


def _series(label: str, heights: np.ndarray, values: np.ndarray) -> Series:
    return Series(
        label, heights.tolist(), float(np.median(values)), float(np.quantile(values, 0.9)), float(values.max())
    )


def _ends(edges: np.ndarray, log: bool = False) -> tuple[float, float, float]:
    low, high = float(edges[0]), float(edges[-1])
    return low, (low * high) ** 0.5 if log else (low + high) / 2, high
