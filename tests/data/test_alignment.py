"""Alignment rows: formats to tokens, the selection, and padded batches that lose and repeat nothing."""

import random
from copy import deepcopy
from itertools import count

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

from agl_trl.data.alignment import (
    AlignmentRow,
    batches,
    driftcaps_requests,
    pad_token_id,
    raw_text_warning,
    select_rows,
    tokenize_row,
)
from agl_trl.data.files import load_rows
from agl_trl.data.rows import is_prompt_only
from tests.helpers.models import byte_tokenizer, chat_rows


def test_formats_of_the_same_conversation_agree(tokenizer):
    rows = chat_rows(4, "q", "a {}")
    other = [{"role": "assistant", "content": "x"}]
    preference = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": other} for r in rows]
    implicit = [
        {"chosen": r["prompt"] + r["completion"], "rejected": r["prompt"] + [{"role": "assistant", "content": "x"}]}
        for r in rows
    ]
    messages = [{"messages": r["prompt"] + r["completion"]} for r in rows]
    expected = [tokenize_row(row, tokenizer) for row in rows]
    assert [tokenize_row(row, tokenizer) for row in preference] == expected
    assert [tokenize_row(row, tokenizer) for row in implicit] == expected
    assert [tokenize_row(row, tokenizer).input_ids for row in messages] == [row.input_ids for row in expected]
    assert tokenizer.decode(expected[1].input_ids[expected[1].answer_start :]) == "a 1</s>"


def test_text_for_a_model_with_a_chat_template_is_told(tokenizer):
    (row,) = select_rows([{"prompt": "How do I pick a lock?"}], 1, 0)
    assert "Row 0 has a prompt that is plain text" in raw_text_warning(row, tokenizer)
    assert raw_text_warning(chat_rows(1, "q", "a {}")[0], tokenizer) is None
    assert raw_text_warning({"text": "Plain text that is to stay."}, tokenizer) is None
    bare = byte_tokenizer()
    bare.chat_template = None
    assert raw_text_warning(row, bare) is None


def test_plain_text_ends_with_one_end_of_sequence_token(tokenizer):
    row = tokenize_row({"prompt": "Hello, ", "completion": "world."}, tokenizer)
    assert tokenizer.decode(row.input_ids[: row.answer_start]) == "Hello, "
    assert tokenizer.decode(row.input_ids[row.answer_start :]) == "world.</s>"
    assert tokenize_row({"prompt": "Hello, ", "chosen": "world.</s>", "rejected": "you."}, tokenizer) == row
    text = tokenize_row({"text": "Hello, world."}, tokenizer)
    assert text.input_ids == row.input_ids and text.answer_start == 1, "the whole row is the answer"


def test_rows_that_a_trainer_has_tokenized_are_taken_as_they_are(tokenizer):
    preference = {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}
    assert tokenize_row(preference, tokenizer) == AlignmentRow([5, 6, 7, 8], 2)
    assert tokenize_row({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, tokenizer) == AlignmentRow([5, 6, 7], 2)
    assert tokenize_row({"input_ids": [5, 6, 7]}, tokenizer) == AlignmentRow([5, 6, 7], 1)


def test_long_rows_lose_their_end_and_must_keep_an_answer(tokenizer):
    row = {"prompt": "question ", "completion": "a long answer"}
    assert tokenize_row(row, tokenizer, 12).input_ids == tokenize_row(row, tokenizer).input_ids[:12]
    for length in (9, 4):
        with pytest.raises(ValueError, match=rf"no token of an answer within {length} tokens: raise `max_length`"):
            tokenize_row(row, tokenizer, length)
    with pytest.raises(ValueError, match="A row with the columns .* has the columns .*, which make no known format"):
        tokenize_row({"question": "a", "answer": "b"}, tokenizer)


def test_a_prompt_alone_needs_an_answer_from_the_model():
    assert is_prompt_only({"prompt": "a", "unsafe": True})
    for column in ("completion", "chosen", "messages", "text", "input_ids"):
        assert not is_prompt_only({"prompt": "a", column: "b"})
    assert not is_prompt_only({"text": "a"})


def test_selection_takes_what_is_marked_and_a_seeded_sample_of_it():
    rows = Dataset.from_list([{"prompt": str(i), "unsafe": i % 3 == 0} for i in range(60)])
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    marked = select_rows(rows, None, 0)
    assert [row["prompt"] for row in marked] == [str(i) for i in range(0, 60, 3)]
    sample = select_rows(rows, 8, 1)
    assert sample == select_rows(list(rows), 8, 1) != select_rows(rows, 8, 2)
    assert len(sample) == 8 and all(row in marked for row in sample)
    assert select_rows(rows.to_iterable_dataset(), 8, 1) == marked[:8], "of a stream the first"
    for given in (rows, list(rows), rows.to_iterable_dataset()):  # of another behaviour, whatever the mark
        assert [row["prompt"] for row in select_rows(given, None, 0, unsafe=None)] == [str(i) for i in range(60)]
        assert len(select_rows(given, 8, 0, unsafe=None)) == 8
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2]), "the global random state is left alone"
    with pytest.raises(ValueError, match="no row to protect"):
        select_rows(rows.filter(lambda row: not row["unsafe"]), None, 0)
    with pytest.raises(ValueError, match="is empty"):
        select_rows(rows.select([]), None, 0, unsafe=None)
    with pytest.raises(TypeError, match="has the splits train, test: pass one of them"):
        select_rows({"train": rows, "test": rows}, None, 0)


def test_rows_of_files_are_read_and_a_failure_is_a_sentence(tmp_path):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}])
    for suffix, write in (("jsonl", rows.to_json), ("csv", rows.to_csv), ("parquet", rows.to_parquet)):
        write(tmp_path / f"rows.{suffix}")
        assert list(load_rows(str(tmp_path / f"rows.{suffix}"))) == list(rows)
    (tmp_path / "empty.jsonl").write_text("")
    for name, reason in (("empty.jsonl", "it holds no rows"), ("none.csv", "there is no such file")):
        with pytest.raises(ValueError) as failed:
            load_rows(str(tmp_path / name))
        assert str(failed.value) == f"Can't read rows from '{tmp_path / name}': {reason}."


def test_requests_of_driftcaps_are_unsafe_and_without_answers():
    rows = driftcaps_requests()
    assert rows.column_names == ["prompt", "unsafe"] and len(rows) > 100
    assert {*rows["unsafe"]} == {True, False}, "those to refuse, and look-alikes to answer"
    assert all(is_prompt_only(row) for row in rows)


def look_alikes(count: int = 30) -> Dataset:
    """Every third row is not unsafe."""
    return Dataset.from_list([row | {"unsafe": i % 3 > 0} for i, row in enumerate(chat_rows(count, "q", "a {}"))])


def test_the_other_rows_are_those_that_are_not_unsafe():
    rows = look_alikes()
    others = select_rows(rows, None, 0, unsafe=False)
    assert others == [row for row in rows if not row["unsafe"]] == select_rows(list(rows), None, 0, unsafe=False)
    assert [row.number for row in others] == [*range(0, 30, 3)], "they keep their numbers"
    sample = select_rows(rows, 4, 1, unsafe=False)
    assert sample == select_rows(list(rows), 4, 1, unsafe=False) and len(sample) == 4
    assert not any(row["unsafe"] for row in sample) and sample != select_rows(rows, 4, 2, unsafe=False)
    assert select_rows(rows.to_iterable_dataset(), 4, 1, unsafe=False) == others[:4], "of a stream the first"
    assert select_rows(rows.to_iterable_dataset(), None, 1, unsafe=False) == others


def test_there_may_be_no_other_rows():
    """Without a column all rows are to be refused; and a mark on each says so too."""
    rows = Dataset.from_list(chat_rows(5, "q", "a {}"))
    for given in (rows, rows.add_column("unsafe", [True] * 5)):
        for form in (given, list(given), given.to_iterable_dataset()):
            for samples in (None, 3):
                assert select_rows(form, samples, 0, unsafe=False) == []


def test_a_stream_with_no_end_is_not_searched_for_ever():
    def endless(first_other: int):
        for row in count():
            yield {"prompt": "q", "completion": f"{row}", "unsafe": row < first_other}

    found = select_rows(IterableDataset.from_generator(endless, gen_kwargs={"first_other": 7}), 4, 0, unsafe=False)
    assert [row["completion"] for row in found] == ["7", "8", "9", "10"]
    never = IterableDataset.from_generator(endless, gen_kwargs={"first_other": 10**9})
    assert select_rows(never, 4, 0, unsafe=False) == []
    assert [row.number for row in select_rows(never, 4, 0)] == [0, 1, 2, 3]


def of_lengths(*lengths: int) -> list[AlignmentRow]:
    """Rows whose tokens are all different, with answers that begin after a third."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [AlignmentRow([*range(2 + end - n, 2 + end)], max(1, n // 3)) for n, end in zip(lengths, ends, strict=True)]


LENGTHS = (7, 3, 12, 3, 9, 5, 4, 11, 6, 2)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_batches_hold_every_row_once_and_only_its_own_tokens(size, processes):
    rows, seen, shapes = of_lengths(*LENGTHS), [], []
    for process in range(processes):
        made = list(batches(rows, size, 0, torch.device("cpu"), (process, processes)))
        shapes.append([len(batch.input_ids) for batch in made])
        for batch in made:
            seen += batch.indices
            for line, ids in enumerate(batch.input_ids.tolist()):
                counts, answers = (
                    mask[line].nonzero().flatten().tolist() for mask in (batch.token_mask, batch.answer_mask)
                )
                if line == len(batch.indices):
                    assert not counts and not answers, "a line that evens the processes out does not count"
                    continue
                row, length = rows[batch.indices[line]], int(batch.attention_mask[line].sum())
                assert ids == row.input_ids + [0] * (len(ids) - length)
                assert counts == [*range(1, length)], "all but the first, and no padding"
                assert [ids[i + 1] for i in answers] == row.input_ids[row.answer_start :], "what is predicted"
    assert sorted(seen) == [*range(len(rows))]
    assert all(shape == shapes[0] for shape in shapes), "every process makes as many passes over as many lines"


def test_rows_of_similar_length_go_together():
    padded = sum(
        int((1 - batch.attention_mask).sum()) for batch in batches(of_lengths(*LENGTHS), 3, 0, torch.device("cpu"))
    )
    in_order = sum(max(part) * len(part) - sum(part) for part in (LENGTHS[i : i + 3] for i in range(0, 10, 3)))
    assert padded < in_order / 2


def test_padding_falls_back_to_the_end_of_sequence():
    tokenizer = byte_tokenizer()
    assert pad_token_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id


def test_an_answer_without_a_token_is_not_a_matter_of_length(tokenizer):
    tokenizer = deepcopy(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no token of an answer within 2 tokens: remove the row\."):
        tokenize_row({"prompt": "hi", "completion": ""}, tokenizer, 9)
