"""Multiple choice by likelihood: a question, what each of its choices would cost, and which one is the answer."""

import os
import string
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.abilities import AbilitySet, MultipleChoice
from ..data.alignment import AlignmentRow
from ..data.rows import content_ids, told_by


class Chosen(NamedTuple):
    """
    What one model chose.

    Args:
        places (`list[int]`):
            Choice of every row, by likelihood per character.
        right, right_by_raw (`Tensor`):
            Whether it is the right one, and whether the choice by the likelihood alone is, boolean, of shape `(rows,)`.
        measured (`Tensor`):
            Whether the likelihoods are finite, boolean, of shape `(rows,)`.
        log_likelihoods (`list[list[float]]`):
            Of every choice of every row, in nats.
    """

    places: list[int]
    right: Tensor
    right_by_raw: Tensor
    measured: Tensor
    log_likelihoods: list[list[float]]


def as_question(question: str) -> str:
    """A question for a model without a chat template."""
    return f"Question: {question}\nAnswer:"


def shown(row: MultipleChoice, lettered: bool) -> tuple[str, list[str]]:
    """What is asked, and what it may be followed by: texts of the choices, or letters of choices that the question shows."""
    if not lettered:
        return row.question, row.choices
    letters = list(string.ascii_uppercase[: len(row.choices)])
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, row.choices, strict=True)]
    return "\n".join([row.question, *lines]), letters


def choice_rows(one: AbilitySet, tokenizer: PreTrainedTokenizerBase) -> tuple[list[AlignmentRow], list[int]]:
    """
    Tokens of every choice of every row after its question, and the numbers of the rows.

    Args:
        one ([`AbilitySet`]):
            Multiple choice.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer. With a chat template, the question is a message of the user, and a choice what the assistant begins with;
            without, both are one text.

    Raises:
        [`RowError`]: If a question can't be put to the model.
    """
    rows, numbers = [], []
    for number, row in zip(one.numbers, one.rows, strict=True):
        question, choices = shown(row, one.lettered)
        with told_by(f"Row {number} of '{one.source}'"):
            if tokenizer.chat_template is not None:
                asked = content_ids(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
                found = [
                    (asked + tokenizer(choice, add_special_tokens=False)["input_ids"], len(asked))
                    for choice in choices
                ]
            else:
                asked = tokenizer(as_question(question))["input_ids"]
                whole = [tokenizer(f"{as_question(question)} {choice}")["input_ids"] for choice in choices]
                # Where they diverge: tokens may merge across the border.
                found = [(ids, max(1, len(os.path.commonprefix([asked, ids])))) for ids in whole]
        rows += [AlignmentRow(ids, start) for ids, start in found]
        numbers += [number] * len(choices)
    return rows, numbers


def chosen(one: AbilitySet, log_likelihoods: Tensor) -> Chosen:
    """
    What follows from the log-likelihoods of all choices of all rows, in one line; of two that are alike the first counts.

    Args:
        one ([`AbilitySet`]):
            Multiple choice.
        log_likelihoods (`Tensor`):
            Of shape `(choices of all rows,)`.
    """
    parts = log_likelihoods.split([len(row.choices) for row in one.rows])
    places, right, by_raw = [], [], []
    for row, part in zip(one.rows, parts, strict=True):
        _, followed = shown(row, one.lettered)
        per_character = part / torch.tensor([len(choice) for choice in followed])
        places.append(int(per_character.argmax()))
        # By their texts: of two choices that say the same, either is right.
        right.append(row.choices[places[-1]] == row.choices[row.answer])
        by_raw.append(row.choices[int(part.argmax())] == row.choices[row.answer])
    measured = torch.tensor([bool(part.isfinite().all()) for part in parts])
    return Chosen(places, torch.tensor(right), torch.tensor(by_raw), measured, [part.tolist() for part in parts])
