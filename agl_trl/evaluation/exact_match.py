"""Exact match: greedy answers, compared with the one right answer as texts or by their last number."""

import re
import unicodedata
from decimal import Decimal
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.abilities import AbilitySet, ExactMatch
from ..data.alignment import AlignmentRow
from ..data.rows import Conversation, Messages, content_ids, told_by
from ..modeling.generation import opened_by_template
from ..modeling.reasoning import without_reasoning
from .answer_cache import AnswerCache
from .answers import kept_answers
from .multiple_choice import as_question


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
ROOM = 8  # tokens beyond the longest right answer


class Answered(NamedTuple):
    """
    Greedy answers of one model.

    Args:
        texts (`list[str]`):
            Answers without reasoning.
        right (`Tensor`):
            Whether each is right, boolean, of shape `(rows,)`.
        measured (`Tensor`):
            Whether each is more than reasoning that was cut off, boolean, of shape `(rows,)`.
    """

    texts: list[str]
    right: Tensor
    measured: Tensor


def normalized(text: str) -> str:
    """A text without differences that don't count: in Unicode forms (NFKC), case, spaces, and a full stop at the end."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").rstrip()


def last_number(text: str) -> Decimal | None:
    """The last number of a text, in which commas part thousands; `None` where there is none."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def is_right(answer: str, expected: str, number: bool) -> bool:
    """Whether an answer is the expected one: by its last number, or as a normalized text."""
    if number:
        return last_number(answer) is not None and last_number(answer) == last_number(expected)
    return normalized(answer) == normalized(expected)


def asked(row: ExactMatch, tokenizer: PreTrainedTokenizerBase) -> Conversation | str:
    """A prompt as it is put to a model: text is a message of the user where there is a chat template."""
    if not isinstance(row.prompt, str):
        return row.prompt
    if tokenizer.chat_template is not None:
        return [{"role": "user", "content": row.prompt}]
    return as_question(row.prompt) if row.is_question else row.prompt


def room_for_answers(one: AbilitySet, tokenizer: PreTrainedTokenizerBase) -> tuple[list[AlignmentRow], list[int]]:
    """Tokens of every prompt and one more, which an answer must have room for, and the numbers of the rows."""
    rows = []
    for number, row in zip(one.numbers, one.rows, strict=True):
        with told_by(f"Row {number} of '{one.source}'"):
            ids = content_ids(tokenizer, asked(row, tokenizer), add_generation_prompt=True)
        rows.append(AlignmentRow([*ids, 0], len(ids)))
    return rows, one.numbers


def answered(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    one: AbilitySet,
    *,
    store: AnswerCache | None,
    max_new_tokens: int,
    batch_size: int,
    end_token_ids: list[int],
    desc: str,
    progress: bool,
) -> Answered:
    """Greedy answers of a model as it is to a set of exact match; arguments as in [`measure_abilities`]."""
    longest = max(len(tokenizer(row.answer, add_special_tokens=False)["input_ids"]) for row in one.rows)
    room = max(max_new_tokens, longest + ROOM)
    prompts: list[Messages] = [asked(row, tokenizer) for row in one.rows]
    texts = kept_answers(
        model,
        tokenizer,
        prompts,
        store=store,
        kind=f"{desc}, {room} tokens, {end_token_ids}",
        max_new_tokens=room,
        batch_size=batch_size,
        end_token_ids=end_token_ids,
        desc=desc,
        progress=progress,
    )
    said, measured = [], []
    for row, prompt, text in zip(one.rows, prompts, texts, strict=True):
        text, thinking = without_reasoning(opened_by_template(tokenizer, prompt) + text)
        measured.append(not thinking)
        # A model without a chat template may go on with questions of its own.
        said.append(text.split("\nQuestion:")[0].strip() if row.is_question and isinstance(prompt, str) else text)
    right = [is_right(text, row.answer, one.number) for text, row in zip(said, one.rows, strict=True)]
    return Answered(said, torch.tensor(right), torch.tensor(measured))
