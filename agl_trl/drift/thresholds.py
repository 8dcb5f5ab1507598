"""Conditions on a drift report, for a pipeline that must stop when a model has lost too much."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..evaluation.behaviour import Behaviour
from ..evaluation.changes import Change, PairedMeans, PairedRates
from ..evaluation.verdict_counts import cut_while_reasoning
from .abilities import ABILITIES, ability_changes, figures_meant, is_of_ability
from .report import DriftReport


OF_WEIGHTS = ("relative_drift", "largest_drift")
RATES = {"refusal_drop": True, "over_refusal_rise": False}  # and whether of unsafe prompts
MEANS = {
    f"{what}_{kind}": kind == "unsafe" for what in ("kl", "nll_rise", "margin_drop") for kind in ("unsafe", "safe")
}
FIGURES = (*OF_WEIGHTS, *RATES, *MEANS, *ABILITIES)


class Condition(NamedTuple):
    """
    A figure, a comparison and a limit, such as `refusal_drop>0.05`: what must not be.

    Args:
        figure (`str`):
            One of [`FIGURES`]; of abilities also with the name of a set, as `ability_drop:mmlu`.
        comparison (`str`):
            `>`, `>=`, `<` or `<=`.
        limit (`float`):
            Number on the right.
    """

    figure: str
    comparison: str
    limit: float

    def __str__(self) -> str:
        return f"{self.figure}{self.comparison}{self.limit:g}"

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """
        Read a condition.

        Raises:
            `ValueError`: If it is not of that form, names no figure, or has a limit that no share can reach.
        """
        match = re.fullmatch(
            r"\s*(\w+(?::[\w.-]+)?)\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*", text
        )
        if match is None:
            raise ValueError(f"'{text}' is no condition: write it like 'refusal_drop>0.05'.")
        if match[1] not in FIGURES and not is_of_ability(match[1]):
            raise ValueError(f"There is no figure '{match[1]}' to set a limit on; there are {', '.join(FIGURES)}.")
        limit = float(match[3])
        if match[1].partition(":")[0] in (*RATES, "ability_drop") and abs(limit) >= 1:
            raise ValueError(f"'{text.strip()}' has no share between -1 and 1: {limit:g} % is {limit / 100:g}.")
        return cls(match[1], match[2], limit)


def check_measurable(conditions: Sequence[Condition], unsafe: Tensor | None, *, served: bool = False) -> None:
    """
    Check, before anything is asked, that the prompts can give the figures that conditions are on.

    Args:
        conditions (`Sequence[Condition]`):
            Conditions.
        unsafe (`Tensor`, *optional*):
            Boolean, of shape `(prompts,)`; `None` where no prompts are asked.
        served (`bool`, *optional*, defaults to `False`):
            Whether servers are asked, which show answers alone.

    Raises:
        `ValueError`: If one needs prompts that there are none of, or what a server does not show.
    """
    for condition in conditions:
        if served and condition.figure not in RATES:
            shows = "neither weights nor logits"
            raise ValueError(
                f"'{condition}' can't be measured: a server shows {shows}; set rules on {' or '.join(RATES)}."
            )
        kind = (RATES | MEANS).get(condition.figure)
        if kind is not None and (unsafe is None or not (unsafe == kind).any()):
            word = "unsafe" if kind else "safe"
            missing = "name some as `--prompts`" if unsafe is None else f"these are all {'safe' if kind else 'unsafe'}"
            raise ValueError(f"'{condition}' needs {word} prompts: {missing}.")


def on_sets(conditions: Sequence[Condition], sets: Mapping[str, bool]) -> list[Condition]:
    """
    Conditions as they are judged: one on abilities that names no set is one on every set of its kind.

    Args:
        conditions (`Sequence[Condition]`):
            Conditions.
        sets (`Mapping[str, bool]`):
            Names of the ability sets, and whether each is of texts.

    Raises:
        `ValueError`: If one is on a set that there is not.
    """
    found = []
    for condition in conditions:
        if not is_of_ability(condition.figure):
            found.append(condition)
            continue
        try:
            figures = figures_meant(condition.figure, sets)
        except ValueError as error:
            raise ValueError(f"'{condition}' {error}.") from error
        found += [condition._replace(figure=figure) for figure in figures]
    return [*dict.fromkeys(found)]


def counted(figure: str, count: int) -> str:
    """What a figure is a sample of, such as `40 unsafe prompts`."""
    if is_of_ability(figure):
        return f"{count} {unit(figure)}"
    return f"{count} {'unsafe' if (RATES | MEANS)[figure] else 'safe'} prompts"


def unit(figure: str) -> str:
    """What a figure is a sample of: prompts, rows, or pieces of texts."""
    if not is_of_ability(figure):
        return "prompts"
    return "pieces of text" if ABILITIES[figure.partition(":")[0]] else "rows"


def of_weights(report: DriftReport) -> dict[str, float]:
    """Figures of the weights, where the report has any."""
    if not report.layers:
        return {}
    return {"relative_drift": report.mean_relative_drift, "largest_drift": report.relative_drift.max().item()}


def paired_rates(
    figure: str, unsafe: Tensor, refused_base: Tensor, refused_tuned: Tensor, asked: Tensor
) -> PairedRates:
    """
    Change of one of [`RATES`]. All tensors are boolean, of shape `(prompts,)`.

    Args:
        figure (`str`):
            Which one.
        unsafe, refused_base (`Tensor`):
            Label, and whether the base model refuses.
        refused_tuned (`Tensor`):
            Whether the tuned model does; anything where it was not asked.
        asked (`Tensor`):
            Whether it was asked.
    """
    chosen = unsafe == RATES[figure]
    before, after = (refused_base, refused_tuned) if RATES[figure] else (~refused_base, ~refused_tuned)
    there, back = before & ~after & asked, ~before & after & asked
    open_there, open_back = before & ~asked, ~before & ~asked
    counts = (int(tensor[chosen].sum()) for tensor in (there, back, torch.ones_like(asked), open_there, open_back))
    return PairedRates(*counts)


def change(answers: Behaviour, figure: str, category: str | None = None) -> Change | None:
    """
    Change that a figure of the answers is the value of, on all prompts of its kind or on one category; `None` without prompts.
    """
    unsafe = (RATES | MEANS)[figure]
    chosen = answers.unsafe == unsafe
    if category is not None:
        chosen = chosen & torch.tensor([name == category for name in answers.categories])
    unasked = (
        {} if category is not None else answers.metadata.get("unasked", {}).get("unsafe" if unsafe else "safe", {})
    )
    if not chosen.any() and not sum(unasked.values()):
        return None
    if figure in RATES:
        sides = answers.unsafe[chosen], answers.refused_base[chosen], answers.refused_tuned[chosen]
        asked = paired_rates(figure, *sides, torch.ones_like(sides[0]))
        may = (unasked.get("refused", 0), unasked.get("answered", 0))
        may_there, may_back = may if unsafe else may[::-1]
        return PairedRates(asked.there, asked.back, asked.total + sum(may), may_there, may_back)
    values = _values(answers, figure)[chosen].double()
    return PairedMeans(values[~values.isnan()].numpy(), sum(unasked.values()))


def _values(answers: Behaviour, figure: str) -> Tensor:
    """One of [`MEANS`] of every prompt, of shape `(prompts,)`."""
    if figure.startswith("kl"):
        return answers.kl_first_tokens
    if figure.startswith("nll"):
        return answers.nll_tuned - answers.nll_base
    return answers.margin_base - answers.margin_tuned


def answers_not_told(figure: str, answers: Behaviour) -> str | None:
    """
    A sentence where answers leave a figure open, so that no rule on it passes: of a rate, where too many were cut off while
    reasoning; of a mean, where some prompts have a number and others none.
    """
    if figure in RATES:
        cut = cut_while_reasoning(answers.metadata, len(answers.categories))
        return None if cut is None else f"{figure} is not measured: {cut}."
    chosen = answers.unsafe == MEANS[figure]
    if figure.startswith("nll"):  # without a reference answer there is none on either side
        chosen = chosen & ~(answers.nll_base.isnan() & answers.nll_tuned.isnan())
    values = _values(answers, figure)[chosen]
    missing = int((~values.isfinite()).sum())
    if missing == 0 or values.isnan().all():
        return None
    return f"{figure} is not measured on {missing} of {counted(figure, len(values))}, where it is no finite number."


def figures(report: DriftReport) -> dict[str, float]:
    """
    Figures a condition can name: of the weights where they have a drift, of the answers where prompts were asked, of every
    ability that was measured.
    """
    values = of_weights(report)
    if report.behaviour is not None:
        for figure in (*RATES, *MEANS):
            measured = change(report.behaviour, figure)
            if measured is not None:
                values[figure] = measured.value
    return values | {figure: found.value for figure, found in ability_changes(report.abilities).items()}
