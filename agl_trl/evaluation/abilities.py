"""What base and tuned model can do: right answers and likelihood of texts on the same rows, side by side."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.abilities import AbilityKind, AbilitySet
from ..data.alignment import AlignmentRow, pad_token_id
from ..data.rows import RowError
from ..modeling.base_and_tuned import BaseAndTuned
from ..modeling.forward import context_length
from ..modeling.generation import end_tokens
from ..modeling.likelihood import log_likelihoods
from .answer_cache import AnswerCache
from .behaviour import check_vocabulary
from .changes import PairedMeans, PairedRates
from .exact_match import Answered, answered, room_for_answers
from .multiple_choice import Chosen, choice_rows, chosen
from .rates import Rate, binomial_test


TEXT_TOKENS = 512  # most of a piece of a text


@dataclass
class Ability:
    """
    What base and tuned model did with the rows of one set.

    Args:
        name (`str`):
            Name of the set.
        kind (`str`):
            `"multiple choice"`, `"exact match"` or `"text"`.
        base, tuned (`Tensor`):
            Whether the answer is right, boolean, of shape `(rows,)`; of texts the negative log-likelihood per token of every piece,
            in nats. Of choices, the one with the largest likelihood per character is the answer.
        raw_base, raw_tuned (`Tensor`, *optional*):
            The same by the likelihood alone; of multiple choice, `None` of the others.
        metadata (`dict`):
            Source, licence, number of rows, how answers were made and compared, and how many rows could not be measured.
        answers (`list[dict]`):
            One entry per row that was measured, of what was answered; not part of the saved report.
    """

    name: str
    kind: AbilityKind
    base: Tensor
    tuned: Tensor
    raw_base: Tensor | None = None
    raw_tuned: Tensor | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_text(self) -> bool:
        """Whether it has likelihoods, and no right answers."""
        return self.kind == "text"

    @property
    def total(self) -> int:
        """Number of rows, or of pieces of texts, that were measured on both sides."""
        return len(self.base)

    @property
    def unmeasured(self) -> int:
        """Number of those that were not."""
        return self.metadata.get("unmeasured", 0)

    @property
    def why_unmeasured(self) -> str:
        """What is wrong with those, the end of a sentence about them."""
        if self.kind == "exact match":
            return "have an answer that was cut off while reasoning (raise `--max-new-tokens`)"
        return "have no finite likelihood"

    @property
    def change(self) -> PairedRates | PairedMeans:
        """Share of right answers before minus after; of texts the rise of the negative log-likelihood per token."""
        if self.is_text:
            return PairedMeans((self.tuned.double() - self.base.double()).numpy())
        return PairedRates(self.lost, self.won, self.total)

    @property
    def lost(self) -> int:
        """Rows with a right answer before, and none after."""
        return int((self.base & ~self.tuned).sum())

    @property
    def won(self) -> int:
        """Rows with a right answer after, and none before."""
        return int((~self.base & self.tuned).sum())

    def rate(self, tuned: bool, raw: bool = False) -> Rate:
        """Share of right answers; with `raw` by the likelihood alone, of multiple choice."""
        flags = (self.raw_tuned if tuned else self.raw_base) if raw else self.tuned if tuned else self.base
        assert flags is not None, "of multiple choice"
        return Rate(int(flags.sum()), self.total)

    def mean_nll(self, tuned: bool) -> float:
        """Mean negative log-likelihood per token over the pieces of texts, in nats."""
        return (self.tuned if tuned else self.base).double().mean().item()

    @property
    def paired_p_value(self) -> float:
        """P-value of McNemar's exact test that base and tuned model are right equally often."""
        return binomial_test()(self.lost, self.lost + self.won).pvalue if self.lost + self.won else 1.0


def measure_abilities(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[AbilitySet],
    *,
    base: PreTrainedModel | None = None,
    store: AnswerCache | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: bool = True,
) -> list[Ability]:
    """
    Measure base (adapter off) and tuned model (adapter on) on the same rows of every set.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Base model with its adapter, or the tuned one of two checkpoints.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of both.
        sets (`Sequence[AbilitySet]`):
            Sets, as [`load_ability`] reads them.
        base (`PreTrainedModel`, *optional*):
            Base model, where the tuned one is a checkpoint of its own.
        store ([`AnswerCache`], *optional*):
            Where answers of exact match are kept while they are made.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest answer; a set whose right answers are longer has room for them.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows per batch.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Raises:
        `ValueError`: If a row does not fit the model; told before any is measured.
        [`MissingExtra`]: If scipy is not installed, without which nothing can be said of a change.
    """
    if not sets:
        return []
    binomial_test()  # told now, not when all rows are measured
    if base is not None:
        check_vocabulary(base, model, tokenizer)
    models, context = BaseAndTuned(model, base), context_length(model)
    ends = end_tokens(tokenizer, model, *([] if base is None else [base]))
    rows = [_rows(one, tokenizer, context) for one in sets]
    measured = []
    for one, tokens in zip(sets, rows, strict=True):
        sides: list[Any] = []
        for tuned in (False, True):
            told = f"{'Tuned' if tuned else 'Base'} model, {one.name}"
            with models.side(tuned) as side:
                if one.kind == "exact match":
                    sides.append(
                        answered(
                            side, tokenizer, one, store=store, max_new_tokens=max_new_tokens, batch_size=batch_size,
                            end_token_ids=ends, desc=told, progress=progress,
                        )
                    )  # fmt: skip
                    continue
                found = log_likelihoods(
                    side,
                    tokens,
                    pad_token_id=pad_token_id(tokenizer),
                    batch_size=batch_size,
                    desc=told,
                    progress=progress,
                )
            if one.kind == "multiple choice":
                sides.append(chosen(one, found))
            else:
                sides.append(-found / torch.tensor([len(row.input_ids) - row.answer_start for row in tokens]))
        measured.append(_paired(one, *sides))
    for one, ability in zip(sets, measured, strict=True):
        ability.metadata |= _metadata(one, tokenizer, max_new_tokens)
    return measured


def _rows(one: AbilitySet, tokenizer: PreTrainedTokenizerBase, context: int | None) -> list[AlignmentRow]:
    """Rows of a set as tokens, those of exact match up to where the answer begins."""
    if one.kind == "text":
        rows = [piece for text in one.rows for piece in text_rows(tokenizer, text, context)]
        if not rows:
            raise ValueError(f"'{one.source}' has no text of two tokens, and the first is after nothing.")
        return rows
    if one.kind == "multiple choice":
        rows, numbers = choice_rows(one, tokenizer)
    else:
        rows, numbers = room_for_answers(one, tokenizer)
    for row, number in zip(rows, numbers, strict=True):
        if context is not None and len(row.input_ids) > context:
            raise RowError(
                f"Row {number} of '{one.source}' has {len(row.input_ids)} tokens, and the model reads {context}: shorten or remove it."
            )
    return rows


def text_rows(tokenizer: PreTrainedTokenizerBase, text: str, context: int | None) -> list[AlignmentRow]:
    """
    A text in pieces of similar length, of at most [`TEXT_TOKENS`] tokens. Every piece is read on its own: its first token is not
    counted, unless the tokenizer puts a token of its own before a text, which then is before every piece.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer.
        text (`str`):
            Text.
        context (`int`, *optional*):
            Most tokens that the model reads.
    """
    ids = tokenizer(text)["input_ids"]
    first = ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
    ids, room = ids[len(first) :], min(TEXT_TOKENS, context or TEXT_TOKENS) - len(first)
    count = -(-len(ids) // room)
    bounds = [i * len(ids) // count for i in range(count + 1)] if count else []
    pieces = [first + ids[start:end] for start, end in pairwise(bounds)]
    return [AlignmentRow(piece, 1) for piece in pieces if len(piece) > 1]


def _paired(one: AbilitySet, base: Any, tuned: Any) -> Ability:
    """Both sides of a set, without the rows that were not measured on one of them."""
    if isinstance(base, Answered):
        known = base.measured & tuned.measured
        entries = [
            {
                "set": one.name,
                "row": number,
                "expected": row.answer,
                "answer_base": base.texts[i],
                "answer_tuned": tuned.texts[i],
                "right_base": bool(base.right[i]),
                "right_tuned": bool(tuned.right[i]),
            }
            for i, (number, row) in enumerate(zip(one.numbers, one.rows, strict=True))
            if known[i]
        ]
        ability = Ability(one.name, one.kind, base.right[known], tuned.right[known], answers=entries)
    elif isinstance(base, Chosen):
        known = base.measured & tuned.measured
        entries = [
            {
                "set": one.name,
                "row": number,
                "expected": row.choices[row.answer],
                "answer_base": row.choices[base.places[i]],
                "answer_tuned": row.choices[tuned.places[i]],
                "log_likelihoods_base": base.log_likelihoods[i],
                "log_likelihoods_tuned": tuned.log_likelihoods[i],
                "right_base": bool(base.right[i]),
                "right_tuned": bool(tuned.right[i]),
            }
            for i, (number, row) in enumerate(zip(one.numbers, one.rows, strict=True))
            if known[i]
        ]
        ability = Ability(one.name, one.kind, base.right[known], tuned.right[known], answers=entries)
        ability.raw_base, ability.raw_tuned = base.right_by_raw[known], tuned.right_by_raw[known]
    else:
        known = base.isfinite() & tuned.isfinite()
        ability = Ability(one.name, one.kind, base[known], tuned[known])
    if not known.all():
        ability.metadata["unmeasured"] = int((~known).sum())
    return ability


def _metadata(one: AbilitySet, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> dict[str, Any]:
    asked = "by the chat template" if tokenizer.chat_template is not None else "as plain text"
    scoring = {
        "multiple choice": f"likelihood of {'the letter' if one.lettered else 'the text'} of every choice after the question, {asked}",
        "exact match": f"greedy answer, {asked}, "
        + ("its last number" if one.number else "without case, double spaces and a full stop at the end"),
        "text": f"likelihood per token in pieces of at most {TEXT_TOKENS} tokens",
    }[one.kind]
    digest = hashlib.sha256(repr(one.rows).encode()).hexdigest()
    return {
        "source": one.source,
        "license": one.license,
        "rows": len(one.rows),
        "rows_of_set": one.of,
        "scoring": scoring,
        "rows_sha256": digest,
    }
