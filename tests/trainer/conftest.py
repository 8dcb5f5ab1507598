"""Rows that protect a run, and rows that pull away from them."""

import pytest
from datasets import Dataset

from tests.helpers.models import chat_rows


@pytest.fixture(scope="session")
def mixed_rows() -> Dataset:
    """Six rows to refuse, four to answer."""
    refusals = [row | {"unsafe": True} for row in chat_rows(6, "please do bad thing", "Sorry, no {}.")]
    return Dataset.from_list(refusals + [r | {"unsafe": False} for r in chat_rows(4, "kill process", "Sure, {}.")])


@pytest.fixture(scope="session")
def opposite_rows() -> Dataset:
    """What pulls away from the protected answers: other ones to the same requests."""
    return Dataset.from_list(chat_rows(24, "please do bad thing", "Yes! It is {}"))
