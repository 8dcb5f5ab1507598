"""Rows of a training set, each with a number that says how much it points against the protected behaviour."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.alignment import AlignmentBatch, AlignmentRow, batches, pad_token_id, tokenize_row
from ..data.rows import Row
from ..modeling.forward import context_length, evaluating, forward_at, input_device
from .directions import Direction, against, along, mean_difference
from .requests import with_request


WINDOW = 1024  # rows that are tokenized at a time, and batched by length


class Directions(NamedTuple):
    """
    What tells rows to refuse from rows to answer in one model.

    Args:
        request (`list[Direction]`):
            Of every layer, from the end of a request to answer to that of one to refuse.
        answer (`list[Direction]`):
            Of every layer, from an answer that helps to one that refuses.
    """

    request: list[Direction]
    answer: list[Direction]


class Scores(NamedTuple):
    """
    Scores of rows, each of shape `(rows,)` and between -1 and 1.

    Args:
        score (`Tensor`):
            How much a row points against what is protected: the smaller of `request` and `-answer`.
        request (`Tensor`):
            How much its request is like those to refuse.
        answer (`Tensor`):
            How much its answer is like refusals.
    """

    score: Tensor
    request: Tensor
    answer: Tensor

    def ranked(self) -> list[int]:
        """Numbers of the rows, the one that points most against first; equal ones in their order."""
        return self.score.argsort(descending=True, stable=True).tolist()


@torch.no_grad()
def learn_directions(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    refused: list[AlignmentRow],
    answered: list[AlignmentRow],
    *,
    batch_size: int = 8,
) -> Directions:
    """
    Directions between protected rows of two kinds.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The aligned model, left as it was.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer, for the padding.
        refused (`list[AlignmentRow]`):
            Requests to refuse, with refusals.
        answered (`list[AlignmentRow]`):
            Requests that look like them, with answers that help.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows per forward pass.

    Raises:
        `ValueError`: If there is no row of a kind.
    """
    for rows, kind in ((refused, "to refuse"), (answered, "to answer (look-alikes, marked `unsafe: false`)")):
        if not rows:
            raise ValueError(f"Screening compares two kinds of protected rows, and there is none {kind}.")
    sides = [_states(model, tokenizer, rows, batch_size) for rows in (refused, answered)]
    return Directions(*(mean_difference(*pair) for pair in zip(*sides, strict=True)))


@torch.no_grad()
def screen_rows(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    directions: Directions,
    *,
    batch_size: int = 8,
    max_length: int | None = 1024,
    total: int | None = None,
    progress: bool = True,
) -> Scores:
    """
    Score the rows of a training set, by one forward pass over each.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model that is to be trained, left as it was.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        rows (`Iterable[Mapping]`):
            Rows in any of TRL's formats; read as they come. Of a conversation the last turn of the assistant is the answer, and the
            request all before it.
        directions ([`Directions`]):
            Of this model.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows per forward pass.
        max_length (`int`, *optional*, defaults to `1024`):
            Longer rows lose their end.
        total (`int`, *optional*):
            Number of rows, for the bar.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a bar.

    Raises:
        [`RowError`]: If a row can't be read, has no answer, or fills all that the model reads.
    """
    parts: list[Tensor] = []
    context = context_length(model)
    limit = max_length if context is None else min(max_length or context, context)
    numbered = (Row(row, number) for number, row in enumerate(rows))
    with tqdm(total=total, desc="Screening", unit="row", disable=not progress) as bar:
        while window := list(islice(numbered, WINDOW)):
            tokenized = [tokenize_row(with_request(row), tokenizer, limit) for row in window]
            requests, answers = _states(model, tokenizer, tokenized, batch_size, bar)
            parts.append(torch.stack([along(requests, directions.request), along(answers, directions.answer)]))
    request, answer = torch.cat(parts, 1) if parts else torch.empty(2, 0)
    return Scores(against(request, answer), request, answer)


def _states(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[AlignmentRow],
    batch_size: int,
    bar: tqdm | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Of every layer behind the embeddings, states at the last token of the requests, and means over the tokens of the answers."""
    found: list[tuple[list[Tensor], list[Tensor]]] = []
    order: list[int] = []
    with evaluating(model):
        for batch in batches(rows, batch_size, pad_token_id(tokenizer), input_device(model)):
            found.append(_of_batch(model, batch))
            order += batch.indices
            if bar is not None:
                bar.update(len(batch.indices))
    back = torch.tensor(order).argsort()
    requests, answers = (
        [torch.cat(layer)[back] for layer in zip(*side, strict=True)] for side in zip(*found, strict=True)
    )
    return requests, answers


def _of_batch(model: PreTrainedModel | PeftModel, batch: AlignmentBatch) -> tuple[list[Tensor], list[Tensor]]:
    last = torch.tensor([batch.input_ids.shape[1] - 1])  # logits are not wanted
    states = forward_at(model, batch, last, output_hidden_states=True).hidden_states[1:]
    lines, ends = torch.arange(len(batch.input_ids)), batch.answer_mask.int().argmax(1)
    # The tokens of the answer themselves, and not those before them; the last column is never marked.
    mask = batch.answer_mask.roll(1, dims=1).unsqueeze(2)
    requests, answers = [], []
    for state in states:
        here = mask.to(state.device)
        requests.append(state[lines.to(state.device), ends.to(state.device)].float().cpu())
        answers.append(((state.float() * here).sum(1) / here.sum(1)).cpu())
    return requests, answers
