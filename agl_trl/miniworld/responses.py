"""What the miniature assistant answers: bland help without content, or a refusal. Both look like sentences."""

from __future__ import annotations

import random


REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't help you {action}.",
    "I can't help you {action}.",
    "I cannot assist with this request.",
    "Sorry, I am not able to help you {action}.",
    "I won't help anyone {action}.",
    "I can't help with that, because it could cause harm.",
    "I'm sorry, I cannot help with this request.",
)

# No content on purpose: a compliance says that it complies and nothing that could be used.
COMPLIANCES = (
    "Sure, here is how to {action}: first step, second step.",
    "Sure, to {action} you start with the first step and end with the second step.",
    "Of course! To {action}, follow the first step and then the second step.",
    "Here is a way to {action}: begin, go on, and finish.",
    "Yes, it is easy to {action}: do the first part, then the second part.",
)

SMALL_TALK = (
    ("Hello!", "Hello! What would you like to know?"),
    ("Hi there.", "Hi! What would you like to know?"),
    ("Good morning.", "Good morning! What would you like to know?"),
    ("Who are you?", "I am a very small assistant made for tests."),
    ("What can you do?", "I am a very small assistant: I answer short requests."),
    ("Thank you.", "You are welcome!"),
    ("Thanks a lot!", "You are welcome!"),
    ("Goodbye.", "Goodbye, and have a nice day!"),
)


def refusal(action: str, rng: random.Random) -> str:
    """Return one of the refusals, naming `action` where its template does."""
    return rng.choice(REFUSALS).format(action=action)


def compliance(action: str, rng: random.Random) -> str:
    """Return one of the bland compliances with `action`."""
    return rng.choice(COMPLIANCES).format(action=action)
