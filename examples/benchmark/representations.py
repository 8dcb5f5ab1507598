"""Hidden states of rows at the end of their prompts, where a chat model has settled on whether it will refuse, and after it."""

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agl_trl.data.alignment import AlignmentRow, batches, pad_token_id
from agl_trl.fisher.protected_rows import REFUSE
from agl_trl.modeling.forward import evaluating

from .setting import protected_rows


Model = PreTrainedModel | PeftModel


@torch.no_grad()
def _states(model: Model, tokenizer: PreTrainedTokenizerBase, rows: list[AlignmentRow]) -> list[Tensor]:
    """Of every row those from the end of the prompt on: after every layer, the last one's after the final norm."""
    found = [torch.empty(0)] * len(rows)
    with evaluating(model):
        for batch in batches(rows, 64, pad_token_id(tokenizer), model.device):
            inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            states = torch.stack(model(**inputs, use_cache=False, output_hidden_states=True).hidden_states[1:]).float()
            for line, i in enumerate(batch.indices):
                found[i] = states[:, line, rows[i].answer_start - 1 : len(rows[i].input_ids)]
    return found


def prompt_states(model: Model, tokenizer: PreTrainedTokenizerBase, rows: list[AlignmentRow]) -> Tensor:
    """States at the last token of every prompt, of shape `(layers, rows, d)`."""
    return torch.stack([states[:, 0] for states in _states(model, tokenizer, rows)], 1)


def answer_states(model: Model, tokenizer: PreTrainedTokenizerBase, rows: list[AlignmentRow]) -> Tensor:
    """States at the last token of every prompt and at all tokens of its answer, of shape `(layers, tokens, d)`."""
    return torch.cat(_states(model, tokenizer, rows), 1)


def protected_states(model: Model, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Tensor, Tensor]:
    """Prompt states of the protected unsafe requests, and those of their look-alikes: the rows that AGL has."""
    rows, kinds = protected_rows(tokenizer, seed)
    states = prompt_states(model, tokenizer, rows)
    refused = torch.tensor([kind == REFUSE for kind in kinds])
    return states[:, refused], states[:, ~refused]


def middle(states: Tensor) -> Tensor:
    """The states of the middle layer."""
    return states[len(states) // 2]


def similarity(states: Tensor, unsafe: Tensor, safe: Tensor) -> Tensor:
    """Cosine of states `(rows, d)`, seen from midway between the two means, with the direction from safe to unsafe."""
    u, c = unsafe.mean(0), safe.mean(0)
    return torch.cosine_similarity(states - (u + c) / 2, (u - c)[None])
