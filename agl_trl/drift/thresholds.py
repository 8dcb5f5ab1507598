"""Conditions on a drift report, for a pipeline that must stop when a model has lost too much."""

import operator
import re
from math import isnan
from typing import NamedTuple

from .report import DriftReport


OF_WEIGHTS = ("relative_drift", "largest_drift")
OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def figures(report: DriftReport) -> dict[str, float]:
    """Figures a condition can name: of the weights where they have a drift, of the answers where prompts were asked."""
    values: dict[str, float] = {}
    if report.layers:
        values = {"relative_drift": report.mean_relative_drift, "largest_drift": report.relative_drift.max().item()}
    answers = report.behaviour
    if answers is None:
        return values
    for unsafe, name in ((True, "unsafe"), (False, "safe")):
        chosen = answers.unsafe == unsafe
        if chosen.any():
            before, after = (answers.refusal(tuned, unsafe).value for tuned in (False, True))
            values["refusal_drop" if unsafe else "over_refusal_rise"] = before - after if unsafe else after - before
            values[f"kl_{name}"] = answers.mean_kl(unsafe)
            values[f"nll_rise_{name}"] = (answers.nll_tuned - answers.nll_base)[chosen].nanmean().item()
            values[f"margin_drop_{name}"] = (answers.margin_base - answers.margin_tuned)[chosen].nanmean().item()
    return values


class Condition(NamedTuple):
    """
    A figure, a comparison and a limit, such as `refusal_drop>0.05`.

    Args:
        figure (`str`):
            One of [`figures`].
        comparison (`str`):
            `>`, `>=`, `<` or `<=`.
        limit (`float`):
            Number on the right.
    """

    figure: str
    comparison: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """
        Read a condition.

        Raises:
            `ValueError`: If it is not of that form.
        """
        match = re.fullmatch(r"\s*(\w+)\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*", text)
        if match is None:
            raise ValueError(f"'{text}' is no condition: write it like 'refusal_drop>0.05'.")
        return cls(match[1], match[2], float(match[3]))

    def holds(self, report: DriftReport) -> str | None:
        """
        A sentence where the condition is met by a report, `None` where it is not. One on a figure of the weights always is
        where tensors changed that no such figure covers, or the report has none.

        Raises:
            `ValueError`: If the report has no such figure.
        """
        known = figures(report)
        if self.figure in OF_WEIGHTS and not report.layers:
            return (
                f"{self.figure} is not measured, since {report.without_weights}: set a limit on the answers instead."
            )
        if self.figure not in known:
            raise ValueError(f"The report has no figure '{self.figure}'; it has {', '.join(known)}.")
        if report.uncovered and self.figure in OF_WEIGHTS:  # what is not covered is not passed
            first = max(report.uncovered, key=report.uncovered.__getitem__)
            return (
                f"{self.figure} covers only a part of what changed: {len(report.uncovered)} tensors are not in it, such as '{first}', "
                f"which changed by {report.uncovered[first]:.2g} of its norm."
            )
        value = known[self.figure]
        if isnan(value) or OPERATORS[self.comparison](value, self.limit):  # NaN: not measured is not passed
            return f"{self.figure} is {value:.4g}, which is {self.comparison} {self.limit:g}."
        return None
