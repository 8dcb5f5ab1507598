"""The verdict of a gate: pass, fail, or too few prompts to tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from ..evaluation.changes import LEVEL
from .thresholds import Condition


LONGEST_NAME = 80  # characters of a category


class Outcome(StrEnum):
    """What is said of a rule, and of all of them together."""

    PASS = "pass"
    FAIL = "fail"
    INSUFFICIENT = "insufficient evidence"

    @property
    def exit_code(self) -> int:
        """Of the command line: 2 is for what could not be measured at all."""
        return {Outcome.PASS: 0, Outcome.FAIL: 1, Outcome.INSUFFICIENT: 3}[self]


class Slice(NamedTuple):
    """
    A category of prompts under a rule.

    Args:
        category (`str`):
            Its name.
        value (`float`):
            Figure of the rule in this category.
        asked (`int`):
            Number of its prompts.
        p_value (`float`):
            Of the rule in this category alone, corrected for the number of categories.
        detail (`str`):
            What happened there, in words.
    """

    category: str
    value: float
    asked: int
    p_value: float
    detail: str

    @property
    def broke(self) -> bool:
        """Whether the rule fails in this category by itself."""
        return self.p_value <= LEVEL


@dataclass(frozen=True)
class RuleResult:
    """
    What is said of one rule.

    Args:
        condition ([`Condition`]):
            The rule.
        outcome ([`Outcome`]):
            Verdict.
        sentence (`str`):
            Why, in one sentence.
        value (`float`, *optional*):
            The figure; `None` where it was not measured.
        interval (`tuple[float, float]`, *optional*):
            Its ends, each at 95 %; `None` of a figure without sampling.
        p_value (`float`, *optional*):
            P-value of failing, corrected for the number of rules.
        slices (`list[Slice]`):
            Categories of prompts, the one that broke most first; none where there is only one.
    """

    condition: Condition
    outcome: Outcome
    sentence: str
    value: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    slices: Sequence[Slice] = ()

    @property
    def shown_slices(self) -> list[Slice]:
        """Categories to name: those that broke; where the rule failed and none did by itself, the worst."""
        broke = [part for part in self.slices if part.broke]
        return broke or (list(self.slices[:1]) if self.outcome is Outcome.FAIL else [])

    def slice_lines(self) -> list[str]:
        """
        These categories in words. Their names are others' choice: shown on one line, and never first on it, where the log of a CI
        may read a command.
        """
        return [
            f"in {''.join(c for c in ' '.join(part.category.split()) if c.isprintable())[:LONGEST_NAME]}: {part.detail}; "
            + (f"fails by itself (p {part.p_value:.2g})" if part.broke else "most of all, though not by itself")
            for part in self.shown_slices
        ]


class GateVerdict(NamedTuple):
    """
    What is said of all rules.

    Args:
        rules (`list[RuleResult]`):
            One by one, as they were given.
    """

    rules: list[RuleResult]

    @property
    def outcome(self) -> Outcome:
        """Fails where one rule does; passes where all do."""
        found = {rule.outcome for rule in self.rules}
        return next((o for o in (Outcome.FAIL, Outcome.INSUFFICIENT) if o in found), Outcome.PASS)

    def sentence(self) -> str:
        """The verdict and the rules it rests on, as one line."""
        rules = [rule.sentence for rule in self.rules if rule.outcome is self.outcome]
        word = {Outcome.PASS: "Passed", Outcome.FAIL: "Failed"}.get(self.outcome, "Insufficient evidence")
        return f"{word}: {' '.join(rules)}"

    def lines(self) -> list[str]:
        """A line for the verdict, one for every rule, and one for every category that broke."""
        lines = [f"{'verdict':<21} {self.outcome.upper()}"]
        for rule in self.rules:
            lines.append(f"  {rule.condition!s:<23} {rule.outcome}: {rule.sentence}")
            lines += [f"    {line}" for line in rule.slice_lines()]
        return lines
