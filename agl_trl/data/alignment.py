"""Alignment rows: any of TRL's dataset formats to token sequences with answer masks, and padded batches of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset, load_dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..artifacts.files import first_line
from ..driftcaps import alignment_rows
from ..miniworld import MINIWORLD, alignment_dataset


# Boolean column that marks the rows whose behaviour must not change; when present, they alone carry the statistics.
PROTECTED_COLUMN = "unsafe"
READERS = {
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
    ".csv": Dataset.from_csv,
    ".parquet": Dataset.from_parquet,
}
FORMATS = (
    "prompt-completion ('prompt', 'completion'), preference ('prompt', 'chosen', 'rejected'), prompt-only ('prompt'), "
    "or language modeling ('messages' or 'text')"
)


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


def load_rows(name: str, split: str = "train", config: str | None = None) -> Dataset:
    """
    Rows of a local `.jsonl`, `.json`, `.csv` or `.parquet` file, of a dataset on the Hub, or of the package itself:
    `"miniworld"` gives the alignment rows of the embedded world, `"driftcaps"` those of DriftCaps.

    Raises:
        `ValueError`: If the file can't be read, or holds nothing.
    """
    if name == MINIWORLD:
        return alignment_dataset()
    if name == "driftcaps":
        return alignment_rows()
    path = Path(name)
    try:
        if path.suffix in READERS:
            if not path.is_file():
                raise FileNotFoundError("there is no such file")
            return READERS[path.suffix](name)
        return load_dataset(name, config, split=split)
    except Exception as error:  # datasets raises a different class for every format and every way to fail
        raise ValueError(f"Can't read rows from '{name}': {read_failure(error)}.") from error


def read_failure(error: Exception) -> str:
    """Why `datasets` could not read a source, as [`first_line`] tells it."""
    cause = error.__cause__ or error
    if isinstance(cause, StopIteration) or "corresponds to no data" in str(cause):  # datasets on empty files
        return "it holds no rows"
    return first_line(cause)


def driftcaps_requests() -> Dataset:
    """Unsafe requests of DriftCaps' protection split, without answers: those of the model itself are to be kept."""
    rows = alignment_rows("protect")
    unsafe = [i for i, marked in enumerate(rows[PROTECTED_COLUMN]) if marked]
    return rows.select(unsafe).select_columns(["prompt", PROTECTED_COLUMN])


def select_rows(
    dataset: Dataset | IterableDataset | Sequence[dict[str, Any]], num_samples: int | None, seed: int
) -> list[dict[str, Any]]:
    """
    Rows that carry the statistics: those marked in the column `unsafe` if the dataset has one, all otherwise; of these
    a seeded sample (of an iterable dataset the first rows).

    Args:
        dataset (`Dataset`, `IterableDataset` or `Sequence[dict]`):
            Alignment dataset.
        num_samples (`int`, *optional*):
            Number of rows; `None` takes all.
        seed (`int`):
            Seed of the sample; the global random state stays untouched.

    Raises:
        `ValueError`: If no row is left.
        `TypeError`: If several splits are given.
    """
    if isinstance(dataset, dict):
        raise TypeError(
            f"The alignment dataset has the splits {', '.join(dataset)}: pass one of them, such as `dataset['train']`."
        )
    if not isinstance(dataset, IterableDataset):
        dataset = dataset if isinstance(dataset, Dataset) else Dataset.from_list(list(dataset))
        if PROTECTED_COLUMN in dataset.column_names:
            marked = [i for i, unsafe in enumerate(dataset[PROTECTED_COLUMN]) if unsafe]
            dataset = dataset.select(marked)
        if num_samples is not None and num_samples < len(dataset):
            dataset = dataset.shuffle(seed=seed).select(range(num_samples))
        rows = list(dataset)
    else:
        rows = list(islice((row for row in dataset if row.get(PROTECTED_COLUMN, True)), num_samples))
    if not rows:
        raise ValueError(
            f"The alignment dataset has no row to protect (column '{PROTECTED_COLUMN}' marks none, or it is empty)."
        )
    return rows


def is_prompt_only(row: dict[str, Any]) -> bool:
    """Whether a row has a prompt and no answer, so that the reference model must give one."""
    return "prompt" in row and not row.keys() & {"completion", "chosen", "messages", "text", "input_ids"}


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Padding token; of a tokenizer without one the end-of-sequence token, or any: the attention mask hides it."""
    found = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return 0 if found is None else found


def tokenize_row(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> AlignmentRow:
    """
    Tokenize one row as TRL would train on it. A preference row stands for its prompt and chosen answer.

    Args:
        row (`dict`):
            Row in one of TRL's formats, conversational or not.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with the chat template of the model.
        max_length (`int`, *optional*):
            Longer rows lose their end.

    Raises:
        `ValueError`: If the format is unknown, or no token of the answer is left.
    """
    from trl import extract_prompt, is_conversational  # here: statistics and callback work without a trainer of TRL

    if "chosen_ids" in row:  # already tokenized, as a DPO trainer's own training rows
        return AlignmentRow((row["prompt_ids"] + row["chosen_ids"])[:max_length], max(len(row["prompt_ids"]), 1))
    if "input_ids" in row:  # and an SFT trainer's
        labels = row.get("labels") or row["input_ids"]
        start = next((i for i, label in enumerate(labels) if label != -100), len(labels))
        return AlignmentRow(list(row["input_ids"])[:max_length], max(start, 1))
    if "chosen" in row and "prompt" not in row:
        row = extract_prompt(row)
    if "prompt" in row and ("completion" in row or "chosen" in row):
        prompt, answer = row["prompt"], row["completion"] if "completion" in row else row["chosen"]
        if is_conversational({"prompt": prompt}):
            prompt_ids = _chat_ids(tokenizer, prompt, add_generation_prompt=True)
            input_ids = _chat_ids(tokenizer, prompt + answer)
        else:
            prompt_ids = tokenizer(prompt)["input_ids"]
            input_ids = tokenizer(prompt + answer + _missing_eos(tokenizer, answer))["input_ids"]
        start = _common_prefix(prompt_ids, input_ids)
    elif "messages" in row:
        input_ids, start = _chat_ids(tokenizer, row["messages"]), 1
    elif "text" in row:
        input_ids, start = tokenizer(row["text"] + _missing_eos(tokenizer, row["text"]))["input_ids"], 1
    else:
        raise ValueError(f"Alignment rows with the columns {sorted(row)} have no known format; use {FORMATS}.")
    input_ids = input_ids[:max_length]
    if start >= len(input_ids):
        raise ValueError(
            f"An alignment row has no token of an answer within {len(input_ids)} tokens: raise `max_length`, or remove the "
            f"row that begins {tokenizer.decode(input_ids[:20])!r}."
        )
    return AlignmentRow(input_ids, max(start, 1))


def _chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool = False
) -> list[int]:
    return tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
    )["input_ids"]


def _missing_eos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    return "" if tokenizer.eos_token is None or text.endswith(tokenizer.eos_token) else tokenizer.eos_token


def _common_prefix(first: list[int], second: list[int]) -> int:
    # Where the two diverge: tokens may merge across the border, or the template render the prompt alone differently.
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


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
