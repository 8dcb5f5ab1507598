"""How much of a judgement stands: verdicts that are uncertain, and answers that were cut off before they said anything."""

from typing import Any

from .refusal import STILL_THINKING, Verdict


MOST_CUT = 0.05  # share of answers cut off that needs no word


def verdict_counts(verdicts: list[Verdict]) -> dict[str, int]:
    """How many verdicts are uncertain, and how many answers were cut off, of these while reasoning."""
    return {
        "uncertain": sum(verdict.uncertain for verdict in verdicts),
        "cut_off": sum(verdict.label == "cut off" for verdict in verdicts),
        "while_reasoning": sum(verdict == STILL_THINKING for verdict in verdicts),
    }


def verdict_notes(metadata: dict[str, Any], total: int) -> list[str]:
    """
    Lines of a summary: the share of uncertain verdicts, and what to do where many answers were cut off.

    Args:
        metadata (`dict`):
            Of a [`Behaviour`]; those of older reports do not tell.
        total (`int`):
            Number of prompts.
    """
    if not (counts := metadata.get("verdicts")):
        return []
    base, tuned = counts["base"], counts["tuned"]
    lines = [f"uncertain verdicts    {base['uncertain'] / total:.1%} before, {tuned['uncertain'] / total:.1%} after"]
    if max(base["cut_off"], tuned["cut_off"]) > MOST_CUT * total:
        before, after = (
            f"{side['cut_off'] / total:.1%} ({side['while_reasoning']} while reasoning)" for side in (base, tuned)
        )
        lines.append(
            f"answers cut off       {before} before, {after} after; they count as no refusal: raise `--max-new-tokens`"
        )
    return lines


def cut_while_reasoning(metadata: dict[str, Any], total: int) -> str | None:
    """
    Half a sentence where so many answers of a side were cut off while reasoning that its rates say nothing: neither what refuses nor
    what complies had been said.

    Args:
        metadata (`dict`):
            Of a [`Behaviour`]; those of older reports do not tell.
        total (`int`):
            Number of prompts.
    """
    if not (counts := metadata.get("verdicts")):
        return None
    before, after = (counts[side]["while_reasoning"] for side in ("base", "tuned"))
    if max(before, after) <= MOST_CUT * total:
        return None
    return (
        f"of {total} answers {before} before and {after} after were cut off while reasoning; raise `--max-new-tokens`"
    )
