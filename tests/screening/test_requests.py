"""What of a row is its request and what its answer, in any of the formats that training rows have."""

from copy import deepcopy

import pytest

from agl_trl.data.alignment import tokenize_row
from agl_trl.data.rows import Row
from agl_trl.screening.requests import is_text_alone, with_request


CHAT = [
    ("system", "be brief"),
    ("user", "hi"),
    ("assistant", "yes?"),
    ("user", "say 7"),
    ("assistant", "the number is 7"),
]


@pytest.mark.parametrize("names", [("role", "content"), ("from", "value")])
def test_the_last_turn_of_a_conversation_is_its_answer(names, tokenizer):
    """The same tokens, and where the answer begins, as those of prompt and completion, with what the template is told."""
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = "{{ mood }}{{ tools | length if tools else '' }}" + tokenizer.chat_template
    roles = {"user": "human", "assistant": "gpt"} if names[0] == "from" else {}
    turns = [{names[0]: roles.get(role, role), names[1]: text} for role, text in CHAT]
    told = {"chat_template_kwargs": {"mood": "kind"}, "tools": [{"type": "function"}], "unsafe": True}
    row = Row({"messages" if names[0] == "role" else "conversations": turns, **told}, 3)
    split = with_request(row)
    messages = [{"role": roles.get(role, role), "content": text} for role, text in CHAT]
    assert split["prompt"] == messages[:-1] and split["completion"] == messages[-1:] and split.number == 3
    found, whole = tokenize_row(split, tokenizer), tokenize_row(row, tokenizer)
    assert found.input_ids == whole.input_ids and whole.answer_start == 1
    answer = tokenizer.decode(found.input_ids[found.answer_start :])
    assert answer.endswith("the number is 7</s>") and "say 7" not in answer
    assert not is_text_alone(row) and row.keys() == {*told, "messages" if names[0] == "role" else "conversations"}


@pytest.mark.parametrize(
    ("columns", "alone"),
    [
        ({"text": "Bread is baked."}, True),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, True),
        ({"messages": [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "hi"}]}, True),
        ({"input_ids": [1, 2]}, True),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, False),
        ({"prompt_ids": [1], "chosen_ids": [2]}, False),
        ({"prompt": "hi", "completion": "yes"}, False),
        ({"chosen": "hi yes", "rejected": "hi no"}, False),
    ],
)
def test_rows_without_a_request(columns, alone):
    row = Row(columns, 0)
    assert is_text_alone(row) is alone and with_request(row) is row
