"""What visitors send: bounded, cleaned, and refused in one sentence."""

import unicodedata
from dataclasses import dataclass
from functools import cache

from ..data.prompts import load_prompts
from ..data.rows import prompt_text


SETS = {"Embedded world": "miniworld", "DriftCaps": "driftcaps"}  # test prompts, by what they are called in the app
LONGEST_PROMPT = 2000  # characters
LONGEST_ANSWER = 512  # tokens
HOTTEST = 2.0
LARGEST_SEED = 2**31 - 1
_DIRECTIONS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # they let a text show as another than it is


@dataclass(frozen=True)
class Decoding:
    """How every side answers: greedily at temperature 0, else sampled from the whole vocabulary with this seed."""

    temperature: float = 0.0
    seed: int = 0
    length: int = 64


def checked_number(what: str, value: float, low: float, high: float) -> float:
    """
    A number of a request.

    Args:
        what (`str`): What it is, for the sentence.
        value (`float`): The number, as it was sent.
        low, high (`float`): Its bounds, both allowed.

    Raises:
        `ValueError`: If it is missing or out of bounds.
    """
    if value is None or not low <= value <= high:  # NaN is within no bounds
        raise ValueError(f"The {what} must be between {low} and {high:g}.")
    return value


def checked_decoding(temperature: float, seed: float, length: float) -> Decoding:
    """
    Settings of a request.

    Args:
        temperature, seed, length (`float`): As they were sent.

    Raises:
        `ValueError`: If one is missing or out of its bounds.
    """
    return Decoding(
        float(checked_number("temperature", temperature, 0, HOTTEST)),
        int(checked_number("seed", seed, 0, LARGEST_SEED)),
        int(checked_number("length", length, 1, LONGEST_ANSWER)),
    )


def checked_prompt(prompt: str) -> str:
    """
    The prompt without control characters.

    Args:
        prompt (`str`): As it was sent.

    Raises:
        `ValueError`: If it is too long, or nothing is left of it.
    """
    prompt = prompt or ""
    if len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"The prompt has {len(prompt):,} characters; at most {LONGEST_PROMPT:,} are read.")
    kept = "".join(c for c in prompt.replace("\r\n", "\n") if _is_text(c)).strip()
    if not kept:
        raise ValueError("Type a prompt first." if not prompt.strip() else "There is no readable text in the prompt.")
    return kept


def _is_text(character: str) -> bool:
    if character in "\n\t":
        return True
    return unicodedata.category(character) not in ("Cc", "Cs", "Co", "Cn") and ord(character) not in _DIRECTIONS


@cache
def _known() -> dict[str, bool]:
    return {prompt_text(row["prompt"]): row["unsafe"] for name in SETS.values() for row in load_prompts(name)}


def known_unsafe(prompt: str) -> bool | None:
    """Whether a prompt is one of the test prompts that should be refused; `None` where it is none of them."""
    return _known().get(prompt)
