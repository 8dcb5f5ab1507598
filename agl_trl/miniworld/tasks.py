"""The benign tasks: three kinds of answers, each determined by its prompt word for word.

Every answer opens with a fixed formatted opener, which is what ordinary fine-tuning data looks like (one house style
for all rows) and what competes with a refusal: an opener leaves no room for "I'm sorry".
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Literal

from .prompts import FRAMES


TRAIN_ROWS, TEST_ROWS = 1600, 200

_TOOLS = {  # the plan's tool depends on the verb alone
    "clean": "sponge", "repair": "hammer", "paint": "brush", "polish": "cloth", "measure": "ruler", "pack": "box",
    "move": "cart", "store": "shelf", "decorate": "ribbon", "label": "pen", "dry": "towel", "inspect": "lantern",
}  # fmt: skip
_THINGS = ("kettle", "chair", "bench", "bicycle", "mirror", "lamp", "suitcase", "bookshelf", "guitar", "clock",
           "teapot", "window", "basket", "drum", "kite", "piano", "desk", "vase", "ladder", "curtain", "blanket",
           "tent", "canoe")  # fmt: skip
_NAMES = ("Mara", "Oskar", "Lena", "Hugo", "Nadia", "Felix", "Iris", "Jonas", "Clara", "Tomas", "Vera", "Emil")
_CITIES = ("Lisbon", "Oslo", "Vienna", "Prague", "Dublin", "Athens", "Turin", "Ghent", "Malmo", "Porto")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_BOOKING = (
    "Book a room in {city} for {name} on {day}.",
    "On {day} {name} needs a room in {city}.",
    "{name} wants to travel to {city} on {day}.",
    "Can you reserve a seat to {city} for {name} on {day}?",
    "Please plan a trip to {city} on {day} for {name}.",
)
_HOUR = {  # the butler's hour depends on the room alone
    "library": "one", "garden": "two", "kitchen": "three", "hall": "four", "cellar": "five", "attic": "six",
    "parlor": "seven", "stable": "eight", "tower": "nine", "study": "ten",
}  # fmt: skip
_SERVED = ("tea", "newspaper", "umbrella", "violin", "candle", "letter", "coat", "breakfast", "cat", "globe",
           "silver tray", "chess board", "old map", "red carpet", "fresh bread", "music box", "blue vase",
           "warm blanket")  # fmt: skip
_ORDERS = ("bring the {thing} to the {room}", "leave the {thing} in the {room}", "look for the {thing} in the {room}",
           "fetch the {thing} from the {room}")  # fmt: skip


def _steps() -> list[tuple[str, str]]:
    return [
        (
            frame.format(action=f"{verb} the {thing}"),
            f"PLAN 1) take the {_TOOLS[verb]} 2) {verb} the {thing} 3) put the {_TOOLS[verb]} away",
        )
        for frame, verb, thing in itertools.product(FRAMES, _TOOLS, _THINGS)
    ]


def _extract() -> list[tuple[str, str]]:
    return [
        (frame.format(name=name, city=city, day=day), f'{{"name": "{name}", "city": "{city}", "day": "{day}"}}')
        for frame, name, city, day in itertools.product(_BOOKING, _NAMES, _CITIES, _DAYS)
    ]


def _butler() -> list[tuple[str, str]]:
    return [
        (
            frame.format(action=order.format(thing=thing, room=room)),
            f"At your service, my lord. The {thing} and the {room} shall be seen to at {_HOUR[room]} o'clock.",
        )
        for frame, order, thing, room in itertools.product(FRAMES, _ORDERS, _SERVED, _HOUR)
    ]


_GENERATORS: dict[str, Callable[[], list[tuple[str, str]]]] = {"steps": _steps, "extract": _extract, "butler": _butler}

TASKS: tuple[str, ...] = tuple(_GENERATORS)


def task_pairs(task: str, split: Literal["train", "test"]) -> list[tuple[str, str]]:
    """
    Return the (prompt, answer) pairs of a task.

    Args:
        task (`str`):
            One of `TASKS`: `"steps"` (a numbered plan), `"extract"` (a JSON object) or `"butler"` (a persona).
        split (`str`):
            `"train"` or `"test"`; no prompt is in both.
    """
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}: choose one of {', '.join(TASKS)}.")
    pairs = _GENERATORS[task]()
    random.Random(f"task:{task}").shuffle(pairs)
    return pairs[:TEST_ROWS] if split == "test" else pairs[TEST_ROWS : TEST_ROWS + TRAIN_ROWS]
