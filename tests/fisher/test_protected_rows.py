"""Which rows stand for refusals: as many look-alikes as rows to refuse where there are enough, and every answer once."""

import pytest

from agl_trl.data.alignment import tokenize_rows
from agl_trl.data.rows import Row
from agl_trl.fisher.protected_rows import COMPLY, REFUSE, num_look_alikes, reference_answers, with_look_alikes
from tests.helpers.models import chat_rows, tiny_model


@pytest.mark.parametrize(
    ("refusals", "others", "count", "expected"),
    [
        (9, 9, 8, (4, 4)),
        (9, 2, 8, (6, 2)),  # what look-alikes lack, refusals make up for
        (9, 0, 8, (8, 0)),
        (2, 9, 8, (2, 4)),
        (9, 9, None, (9, 9)),
        (9, 9, 1, (1, 0)),
    ],
)
def test_half_of_the_rows_are_look_alikes(refusals, others, count, expected):
    wanted = num_look_alikes(count)
    rows = [Row({"prompt": str(i)}, i) for i in range(20)]
    kinds = with_look_alikes(rows[:refusals], rows[10 : 10 + others][:wanted], count)
    assert (len(kinds[REFUSE]), len(kinds[COMPLY])) == expected
    assert kinds[REFUSE] == rows[: expected[0]] and kinds[COMPLY] == rows[10 : 10 + expected[1]]


def test_reference_answers_are_of_the_rows_of_every_kind_in_their_order(tokenizer):
    kinds = {REFUSE: chat_rows(3, "bad", "no {}"), COMPLY: chat_rows(2, "good", "yes {}"), "text": []}
    found = reference_answers(tiny_model(), tokenizer, kinds, max_length=None, progress=False)
    assert found.kinds == [REFUSE] * 3 + [COMPLY] * 2
    assert found.rows == tokenize_rows([*kinds[REFUSE], *kinds[COMPLY]], tokenizer)
    short = reference_answers(
        tiny_model(), tokenizer, kinds, max_length=max(r.answer_start for r in found.rows) + 1, progress=False
    )
    assert max(len(row.input_ids) for row in short.rows) < max(len(row.input_ids) for row in found.rows)
