"""Directions between the mean states of two kinds of rows, and how far other rows lie along them."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize


class Direction(NamedTuple):
    """
    Direction of one layer, from the mean state of one kind of rows to that of another.

    Args:
        normal (`Tensor`):
            Unit vector, of shape `(hidden size,)`; zero where the means are the same.
        middle (`Tensor`):
            Point between the two means, of the same shape.
    """

    normal: Tensor
    middle: Tensor


def mean_difference(to: list[Tensor], away: list[Tensor]) -> list[Direction]:
    """
    Directions of all layers.

    Args:
        to (`list[Tensor]`):
            States of the rows that the directions point to, of every layer, of shape `(rows, hidden size)`.
        away (`list[Tensor]`):
            States of those that they point away from.
    """
    means = [(one.mean(0), other.mean(0)) for one, other in zip(to, away, strict=True)]
    return [Direction(normalize(one - other, dim=0), (one + other) / 2) for one, other in means]


def along(states: list[Tensor], directions: list[Direction]) -> Tensor:
    """
    Mean over layers of the cosine between state and direction, seen from the middle of the two kinds, of shape `(rows,)`: above 0 on
    the side that the directions point to.

    Args:
        states (`list[Tensor]`):
            Of every layer, of shape `(rows, hidden size)`.
        directions (`list[Direction]`):
            Of every layer.
    """
    cosines = [normalize(s - d.middle, dim=1) @ d.normal for s, d in zip(states, directions, strict=True)]
    return torch.stack(cosines).mean(0)


def against(request: Tensor, answer: Tensor) -> Tensor:
    """
    How much a row points against what is protected: it must ask for what is to be refused, *and* not refuse. A refusal of an unsafe
    request teaches what is wanted, and so does help with a safe one.

    Args:
        request (`Tensor`):
            How much requests are like those to refuse, of shape `(rows,)`.
        answer (`Tensor`):
            How much answers are like refusals, of the same shape.
    """
    return torch.minimum(request, -answer)
