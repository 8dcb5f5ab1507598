"""Directions between two kinds of rows, by hand."""

import pytest
import torch

from agl_trl.screening.directions import against, along, mean_difference


def test_rows_lie_along_the_direction_from_one_mean_to_the_other():
    to, away = torch.tensor([[2.0, 1.0], [4.0, 1.0]]), torch.tensor([[0.0, 1.0], [-2.0, 1.0]])
    (direction,) = mean_difference([to], [away])
    assert direction.normal.tolist() == [1.0, 0.0] and direction.middle.tolist() == [1.0, 1.0]
    states = torch.tensor([[5.0, 1.0], [-3.0, 1.0], [1.0, 9.0], [2.0, 2.0]])
    assert along([states], [direction]).tolist() == pytest.approx([1.0, -1.0, 0.0, 0.5**0.5])


def test_layers_count_alike_whatever_their_size_and_scale():
    generator = torch.Generator().manual_seed(0)
    states = [scale * torch.randn(6, size, generator=generator) for size, scale in ((3, 1.0), (5, 1e4))]
    directions = mean_difference([s[:3] for s in states], [s[3:] for s in states])
    parts = [along([s], [d]) for s, d in zip(states, directions, strict=True)]
    torch.testing.assert_close(along(states, directions), (parts[0] + parts[1]) / 2)


def test_kinds_that_are_the_same_tell_nothing():
    states = [torch.ones(2, 3)]
    assert along([torch.randn(4, 3)], mean_difference(states, states)).tolist() == [0.0] * 4


def test_a_row_points_against_only_where_it_asks_and_does_not_refuse():
    request, answer = torch.tensor([0.8, 0.8, -0.5, -0.5]), torch.tensor([-0.6, 0.6, -0.6, 0.6])
    assert against(request, answer).tolist() == pytest.approx([0.6, -0.6, -0.5, -0.6])
