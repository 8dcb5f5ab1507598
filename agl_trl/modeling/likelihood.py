"""How likely a model finds what follows in a row: reference answers, choices after a question, texts."""

from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.alignment import AlignmentRow, batches, pad_token_id, tokenize_rows
from .forward import answer_logits, context_length, evaluating, input_device


LOGITS = 2**28  # most logits of a forward pass: half a gigabyte in bfloat16
MOST_TOKENS = 2**14  # of a forward pass: 32 rows of 512 tokens


def answer_nll(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | list[dict[str, Any]],
    *,
    batch_size: int = 32,
    max_length: int | None = 1024,
) -> Tensor:
    """
    Mean negative log-likelihood per token of the reference answer of every row, in nats, of shape `(rows,)`.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Model, with or without an adapter; left as it was.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        dataset (`Dataset` or `list[dict]`):
            Rows in prompt-completion format.
        batch_size (`int`, *optional*, defaults to `32`):
            Most rows per forward pass.
        max_length (`int`, *optional*, defaults to `1024`):
            Longer rows lose their end.
    """
    rows = tokenize_rows(dataset, tokenizer, max_length, context_length(model))
    pad = pad_token_id(tokenizer)
    found = log_likelihoods(model, rows, pad_token_id=pad, batch_size=batch_size, progress=False)
    return -(found / torch.tensor([len(row.input_ids) - row.answer_start for row in rows])).float()


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel | PeftModel,
    rows: list[AlignmentRow],
    *,
    pad_token_id: int,
    batch_size: int = 32,
    desc: str = "Likelihoods",
    progress: bool = True,
) -> Tensor:
    """
    Log-likelihood of the answer of every row, summed over its tokens, in nats, of shape `(rows,)`, in float64.

    Rows that differ in their last token alone, as choices of one token do, are one line of one forward pass.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Model, with or without an adapter; left as it was.
        rows (`list[AlignmentRow]`):
            Rows.
        pad_token_id (`int`):
            Padding token.
        batch_size (`int`, *optional*, defaults to `32`):
            Most rows per forward pass; fewer where their logits are large.
        desc (`str`, *optional*, defaults to `"Likelihoods"`):
            Text of the progress bar.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show it.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        alike.setdefault((row.answer_start, *row.input_ids[:-1]), []).append(index)
    groups = list(alike.values())
    lines = [rows[members[0]] for members in groups]
    found = torch.zeros(len(rows), dtype=torch.float64)
    with evaluating(model), tqdm(total=len(lines), desc=desc, disable=not progress) as bar:
        for batch in batches(lines, _lines(model, lines, batch_size), pad_token_id, input_device(model)):
            logits, mask = answer_logits(model, batch)
            for line, group in enumerate(batch.indices):  # one by one: a batch of vocabularies in float32 is large
                log_probs = logits[line, mask[line].to(logits.device)].float().log_softmax(-1)
                for index in groups[group]:
                    answer = torch.tensor(rows[index].input_ids[rows[index].answer_start :], device=logits.device)
                    found[index] = log_probs.gather(1, answer[:, None]).cpu().double().sum()
            bar.update(len(batch.indices))
    return found


def _lines(model: PreTrainedModel | PeftModel, rows: list[AlignmentRow], batch_size: int) -> int:
    """Rows of a forward pass whose states and logits fit."""
    answer = max(len(row.input_ids) - row.answer_start for row in rows)
    length = max(len(row.input_ids) for row in rows)
    vocabulary = model.config.get_text_config().vocab_size
    return max(1, min(batch_size, LOGITS // (answer * vocabulary), MOST_TOKENS // length))
