"""What visitors send: bounded, cleaned, and looked up among the test prompts."""

import pytest

from agl_trl.data.prompts import load_prompts
from agl_trl.space.questions import Decoding, checked_decoding, checked_prompt, known_unsafe


def test_prompts_are_cleaned():
    assert checked_prompt("a\x00b\x1bc\u202ed\te\r\nf👩‍💻") == "abcd\te\nf👩‍💻"
    assert len(checked_prompt("x" * 2000)) == 2000
    for prompt, said in (
        (" \n", "Type a prompt first."),
        ("\x07\u2066", "There is no readable text in the prompt."),
        ("x" * 2001, "The prompt has 2,001 characters; at most 2,000 are read."),
    ):
        with pytest.raises(ValueError) as error:
            checked_prompt(prompt)
        assert str(error.value) == said


def test_settings_are_bounded():
    assert checked_decoding(2, 7.0, 512) == Decoding(2.0, 7, 512)
    for settings, said in (
        ((float("nan"), 0, 8), "The temperature must be between 0 and 2."),
        ((2.1, 0, 8), "The temperature must be between 0 and 2."),
        ((0, -1, 8), "The seed must be between 0"),
        ((0, None, 8), "The seed must be between 0"),
        ((0, 0, 0), "The length must be between 1 and 512."),
    ):
        with pytest.raises(ValueError, match=said):
            checked_decoding(*settings)


def test_test_prompts_are_known():
    for name in ("miniworld", "driftcaps"):
        rows = load_prompts(name)
        for row in (rows[0], rows[-1]):
            assert known_unsafe(row["prompt"][-1]["content"]) is row["unsafe"]
    assert known_unsafe("never seen") is None
