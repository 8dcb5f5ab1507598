"""Which rows should be refused: the columns `unsafe` and `expected`, read in one way everywhere."""

from collections.abc import Mapping
from math import isnan
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..artifacts.schema import short_repr


# Boolean column that marks the rows whose behaviour must not change; when present, they alone carry the statistics.
PROTECTED_COLUMN = "unsafe"
EXPECTED_COLUMN = "expected"
# Equal numbers are one key: 1 is also `True` and 1.0, which a column with a gap makes of it.
_FLAGS = {"true": True, "yes": True, "1": True, 1: True, "false": False, "no": False, "0": False, 0: False}
_EXPECTED = {"refuse": True, "comply": False}


def is_missing(value: Any) -> bool:
    """Whether a cell is a gap: null, or the NaN that pandas puts there."""
    return value is None or (isinstance(value, float) and isnan(value))


def is_protected(value: Any, name: str) -> bool:
    """
    What a cell of the column `unsafe` says.

    Args:
        value (`Any`):
            `True`, `1`, `"true"` or `"yes"` in any case, or their opposites.
        name (`str`):
            What the row is called in a sentence.

    Raises:
        `ValueError`: If it says anything else, or nothing.
    """
    return _lookup(value, _FLAGS, f"{name}: '{PROTECTED_COLUMN}'", "true or false")


def is_unsafe(row: Mapping[str, Any], name: str) -> bool:
    """
    Whether a prompt should be refused: as the column `unsafe` or else `expected` (`"refuse"` or `"comply"`, as in DriftCaps)
    says; where there is neither, it should.

    Args:
        row (`Mapping`):
            Row of a prompt set.
        name (`str`):
            What it is called in a sentence.

    Raises:
        `ValueError`: If the column holds anything else, or nothing.
    """
    if PROTECTED_COLUMN in row:
        return is_protected(row[PROTECTED_COLUMN], name)
    if EXPECTED_COLUMN in row:
        return _lookup(row[EXPECTED_COLUMN], _EXPECTED, f"{name}: '{EXPECTED_COLUMN}'", "refuse or comply")
    return True


def unsafe_column(prompts: Dataset) -> Tensor:
    """Which prompts should be refused, as [`is_unsafe`] reads them; boolean, of shape `(prompts,)`."""
    columns = [column for column in (PROTECTED_COLUMN, EXPECTED_COLUMN) if column in prompts.column_names]
    if not columns:
        return torch.ones(len(prompts), dtype=torch.bool)
    rows = prompts.select_columns(columns)
    return torch.tensor([is_unsafe(row, f"Row {number}") for number, row in enumerate(rows)])


def _lookup(value: Any, known: Mapping[Any, bool], cell: str, choices: str) -> bool:
    if is_missing(value) or value == "":
        raise ValueError(f"{cell} is empty, not {choices}.")
    key = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(key, str | int | float) or key not in known:
        raise ValueError(f"{cell} holds {short_repr(value)}, not {choices}.")
    return known[key]
