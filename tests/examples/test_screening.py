"""The measurement of screening: what counts as found, and rows that must not be."""

import pytest
import torch

from agl_trl.screening.screen import Scores
from examples.screening import DECOYS, decoys, mixed_rows, precision_at_k


def test_precision_is_of_as_many_rows_as_are_hostile():
    scores = torch.tensor([0.9, 0.1, 0.8, 0.7])
    assert precision_at_k(Scores(scores, scores, scores), [True, False, False, True]) == 0.5
    assert precision_at_k(Scores(scores, scores, scores), [True, False, True, True]) == 1.0


@pytest.mark.parametrize(("share", "count"), [(0.01, 16), (0.1, 160)])
def test_hostile_rows_are_those_that_differ_and_decoys_are_none_of_them(share, count):
    rows, hostile = mixed_rows(share, seed=1)
    assert sum(hostile) == count and len(rows) == 1600
    others = decoys(1)
    assert len(others) == 2 * DECOYS
    harmful = {str(rows[i]["completion"]) for i in range(len(rows)) if hostile[i]}
    assert not harmful & {str(row["completion"]) for row in others}
