"""Alignment rows: the selected ones, as token sequences with answer masks, and padded batches of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..driftcaps import alignment_rows
from .labels import PROTECTED_COLUMN, is_protected
from .rows import Row, RowError, content_ids, read_columns, row_name, template_options, told_by


SEARCHED = 10  # rows of a stream that are read for each one that is not unsafe


@dataclass(frozen=True)
class AlignmentRow:
    """
    One tokenized row.

    Args:
        input_ids (`list[int]`):
            Tokens of prompt and answer.
        answer_start (`int`):
            Position of the first token of the answer; 1 where the whole row is the answer.
    """

    input_ids: list[int]
    answer_start: int


def driftcaps_requests() -> Dataset:
    """
    Requests of DriftCaps' protection split, unsafe ones and those that look like them, without answers: those of the model itself
    are to be kept.
    """
    return alignment_rows("protect").select_columns(["prompt", PROTECTED_COLUMN])


def select_rows(
    dataset: Dataset | IterableDataset | Sequence[Mapping[str, Any]],
    num_samples: int | None,
    seed: int,
    *,
    unsafe: bool | None = True,
) -> list[Row]:
    """
    Rows that carry the statistics: those marked in the column `unsafe` if the dataset has one, all otherwise; of these
    a seeded sample (of an iterable dataset the first rows). They keep their numbers in the dataset. With `unsafe=False` the
    others, of which there may be none: look-alikes, which the model is to go on answering. With `unsafe=None` all, whatever the mark.

    Args:
        dataset (`Dataset`, `IterableDataset` or `Sequence[Mapping]`):
            Alignment dataset.
        num_samples (`int`, *optional*):
            Number of rows; `None` takes all.
        seed (`int`):
            Seed of the sample; the global random state stays untouched.
        unsafe (`bool`, *optional*, defaults to `True`):
            Whether to take the rows that carry the statistics, or the others; `None` takes both.

    Raises:
        `ValueError`: If no row is left that carries them, or a row can't be read.
        `TypeError`: If several splits are given.
    """
    if isinstance(dataset, dict):
        raise TypeError(
            f"The alignment dataset has the splits {', '.join(dataset)}: pass one of them, such as `dataset['train']`."
        )
    if isinstance(dataset, IterableDataset):
        # Of other rows than unsafe ones there may be none, and the dataset may have no end.
        last = SEARCHED * num_samples if unsafe is False and num_samples is not None else None
        numbered = (Row(row, number) for number, row in enumerate(islice(dataset, last)))
        rows = list(islice((row for row in numbered if _is_wanted(row, unsafe)), num_samples))
    elif isinstance(dataset, Dataset):
        marks = [column for column in dataset.column_names if column.strip() == PROTECTED_COLUMN]
        if marks and unsafe is not None:
            marked = [Row(row, i) for i, row in enumerate(dataset.select_columns(marks))]
            carrying: Sequence[int] = [row.number for row in marked if _is_wanted(row, unsafe)]
        else:
            carrying = () if unsafe is False else range(len(dataset))
        chosen = _sample(carrying, num_samples, seed)
        rows = [Row(row, number) for number, row in zip(chosen, dataset.select(chosen), strict=True)]
    else:
        marked = [Row(row, number) for number, row in enumerate(dataset)]
        marked = [row for row in marked if _is_wanted(row, unsafe)]
        rows = [marked[i] for i in _sample(range(len(marked)), num_samples, seed)]
    if unsafe is None and not rows:
        raise ValueError("A dataset has no row to protect: it is empty.")
    if unsafe and not rows:
        raise ValueError(
            f"The alignment dataset has no row to protect (column '{PROTECTED_COLUMN}' marks none, or it is empty)."
        )
    return rows


def _is_wanted(row: Row, unsafe: bool | None) -> bool:
    """A row without a mark carries the statistics."""
    if unsafe is None:
        return True
    return (PROTECTED_COLUMN not in row or is_protected(row[PROTECTED_COLUMN], row_name(row))) == unsafe


def _sample(chosen: Sequence[int], num_samples: int | None, seed: int) -> Sequence[int]:
    if num_samples is None or num_samples >= len(chosen):
        return chosen
    return Dataset.from_dict({"number": chosen}).shuffle(seed=seed)["number"][:num_samples]


def raw_text_warning(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What to tell somebody whose model has a chat template, while the prompt of a row is text, which is read without it."""
    if tokenizer.chat_template is None or not isinstance(row.get("prompt"), str):
        return None
    return (
        f"{row_name(row)} has a prompt that is plain text, which is protected as it is, without the chat template: write "
        '`[{"role": "user", "content": ...}]` if the model is to be asked in conversations.'
    )


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Padding token; of a tokenizer without one the end-of-sequence token, or any: the attention mask hides it."""
    found = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return 0 if found is None else found


def tokenize_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    context: int | None = None,
) -> list[AlignmentRow]:
    """[`tokenize_row`] of every row; those that have no number yet are counted from 0."""
    return [tokenize_row(Row(row, number), tokenizer, max_length, context) for number, row in enumerate(rows)]


def tokenize_row(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    context: int | None = None,
) -> AlignmentRow:
    """
    Tokenize one row as TRL would train on it. A preference row stands for its prompt and chosen answer.

    Args:
        row (`Mapping`):
            Row in one of TRL's formats, conversational or not.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with the chat template of the model.
        max_length (`int`, *optional*):
            Longer rows lose their end.
        context (`int`, *optional*):
            Most tokens that the model reads; a row of more is refused.

    Raises:
        [`RowError`]: If the format is unknown, no token of the answer is left, or the row is too long for the model.
    """
    name = row_name(row)
    if isinstance(row, Row) and row.tokens is not None:
        input_ids, start = row.tokens
    elif row.keys() & {"chosen_ids", "input_ids"}:
        with told_by(name):
            input_ids, start = _given_ids(row)
    else:
        input_ids, start = _ids(row, tokenizer, name)
    input_ids, start = input_ids[:max_length], max(start, 1)
    if start >= len(input_ids):
        advice = "raise `max_length`, or remove the row" if len(input_ids) == max_length else "remove the row"
        raise RowError(f"{name} has no token of an answer within {len(input_ids)} tokens: {advice}.")
    if context is not None and len(input_ids) > context:
        raise RowError(
            f"{name} has {len(input_ids)} tokens, and the model reads {context}: shorten or remove the row."
        )
    return AlignmentRow(input_ids, start)


def _given_ids(row: Mapping[str, Any]) -> tuple[list[int], int]:
    """Of a trainer's own rows: DPO's, and SFT's, whose labels tell where the answer begins."""
    if "chosen_ids" in row:
        return row["prompt_ids"] + row["chosen_ids"], len(row["prompt_ids"])
    labels = row.get("labels") or row["input_ids"]
    start = next((i for i, label in enumerate(labels) if label != -100), len(labels))
    return list(row["input_ids"]), start


def _ids(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[list[int], int]:
    """Tokens of a row, and where its answer begins: as `SFTTrainer` and, of a preference row, `DPOTrainer` have them."""
    columns, options = read_columns(row), template_options(row, name)
    if columns.keys() == {"prompt"}:
        raise RowError(f"{name} has a prompt and no answer.")
    with told_by(name):
        if "chosen" in columns and "prompt" not in columns:
            columns = _with_prompt(columns["chosen"], columns["rejected"])
        if "prompt" not in columns:
            (content,) = columns.values()
            return content_ids(tokenizer, _ended(tokenizer, content), **options), 0
        prompt, *answers = columns.values()
        given = content_ids(tokenizer, prompt, add_generation_prompt=True, **options)
        whole = [content_ids(tokenizer, prompt + _ended(tokenizer, answer), **options) for answer in answers]
        # Where they diverge: tokens may merge across the border, or the template render the prompt alone differently.
        return whole[0], min(_common_prefix(given, ids) for ids in whole)


def _common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (left, right) in pairs if left != right), min(len(one), len(other)))


def _with_prompt(chosen: Any, rejected: Any) -> dict[str, Any]:
    """Two answers that begin with their prompt, taken apart as `trl.extract_prompt` does, which callback and statistics do without."""
    end = min(_common_prefix(chosen, rejected), min(len(chosen), len(rejected)) - 1)
    if end > 0 and chosen[end] != rejected[end] and chosen[end - 1] == " ":
        end -= 1  # tokenizers take a space together with the word that follows
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _ended(tokenizer: PreTrainedTokenizerBase, content: Any) -> Any:
    """Text with the end-of-sequence token, which the template gives to conversations."""
    end = tokenizer.eos_token
    return content if isinstance(content, list) or end is None or content.endswith(end) else content + end


@dataclass(frozen=True)
class AlignmentBatch:
    """
    Rows padded on the right.

    Args:
        input_ids (`Tensor`):
            Of shape `(batch, length)`.
        attention_mask (`Tensor`):
            Of shape `(batch, length)`, 1 on tokens.
        token_mask (`Tensor`):
            Boolean, of shape `(batch, length)`: tokens that count in the statistics, all but padding and the first of
            every row (BOS or whatever stands in its place: an attention sink whose huge activations would rule X).
        answer_mask (`Tensor`):
            Boolean, of shape `(batch, length)`: positions whose *next* token belongs to the answer.
        indices (`list[int]`):
            Position in the whole list of every row that counts, whatever the batching.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_mask: Tensor
    answer_mask: Tensor
    indices: list[int]


def batches(
    rows: list[AlignmentRow], batch_size: int, pad_token_id: int, device: torch.device, shard: tuple[int, int] = (0, 1)
) -> Iterator[AlignmentBatch]:
    """
    Padded batches of rows of similar length.

    Args:
        rows (`list[AlignmentRow]`):
            All rows.
        batch_size (`int`):
            Rows per batch.
        pad_token_id (`int`):
            Padding token.
        device (`torch.device`):
            Where the tensors go.
        shard (`tuple[int, int]`, *optional*, defaults to `(0, 1)`):
            Process index and number of processes: every process takes its share of the rows.
    """
    process, num_processes = shard
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].input_ids), i))[process::num_processes]
    # As many rows for every process, so that all make as many forward passes (FSDP gathers weights in each); one more line
    # that does not count, where a process has one row fewer.
    lines = -(-len(rows) // num_processes)
    for start in range(0, lines, batch_size):
        indices = order[start : start + batch_size]
        members = indices if start + batch_size < lines or len(order) == lines else [*indices, order[-1]]
        length = max(len(rows[i].input_ids) for i in members)
        input_ids = torch.full((len(members), length), pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        answer_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for line, index in enumerate(members):
            row = rows[index]
            end = len(row.input_ids)
            input_ids[line, :end] = torch.tensor(row.input_ids)
            attention_mask[line, :end] = 1
            answer_mask[line, row.answer_start - 1 : end - 1] = True
        token_mask = attention_mask.bool()
        token_mask[:, 0] = False
        token_mask[len(indices) :] = answer_mask[len(indices) :] = False
        yield AlignmentBatch(
            input_ids.to(device), attention_mask.to(device), token_mask.to(device), answer_mask.to(device), indices
        )
