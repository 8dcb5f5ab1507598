"""Abilities under rules: which figure a set has, which sets a rule is on, and what a set can't tell."""

from collections.abc import Iterable, Mapping, Sequence

from ..evaluation.abilities import Ability
from ..evaluation.changes import Change


ABILITIES = {"ability_drop": False, "nll_rise": True}  # and whether of texts; of one set, as `ability_drop:mmlu`


def figure_of(name: str, is_text: bool) -> str:
    """The figure of a set, as a rule names it."""
    return f"{'nll_rise' if is_text else 'ability_drop'}:{name}"


def is_of_ability(figure: str) -> bool:
    """Whether a figure is of abilities: of all sets, or of one."""
    return figure.partition(":")[0] in ABILITIES


def figures_meant(figure: str, sets: Mapping[str, bool]) -> list[str]:
    """
    Figures of sets that a rule is on: one, or where it names none, every one of its kind.

    Args:
        figure (`str`):
            Figure of the rule.
        sets (`Mapping[str, bool]`):
            Names of the sets, and whether each is of texts.

    Raises:
        `ValueError`: If there is no such set, half a sentence.
    """
    kind, _, wanted = figure.partition(":")
    fitting = [name for name, is_text in sets.items() if is_text == ABILITIES[kind]]
    if not wanted and fitting:
        return [figure_of(name, ABILITIES[kind]) for name in fitting]
    if wanted in fitting:
        return [figure]
    what = "of texts" if ABILITIES[kind] else "with right answers"
    if not wanted:
        raise ValueError(f"needs a set {what}: name one as `--ability`")
    if wanted in sets:
        raise ValueError(f"needs a set {what}, and '{wanted}' is none")
    known = f"; there are {', '.join(sets)}" if sets else ""
    raise ValueError(f"needs the set '{wanted}': name it as `--ability`{known}")


def ability_changes(abilities: Iterable[Ability]) -> dict[str, Change]:
    """Change of every set, by its figure."""
    return {figure_of(one.name, one.is_text): one.change for one in abilities if one.total}


def not_told(figure: str, abilities: Sequence[Ability]) -> str | None:
    """A sentence where some rows of a set could not be measured, so that no rule on it passes."""
    one = next((one for one in abilities if figure_of(one.name, one.is_text) == figure), None)
    if one is None or not one.unmeasured:
        return None
    total = one.total + one.unmeasured
    return f"{figure} is not measured on {one.unmeasured} of {total} rows, which {one.why_unmeasured}."
