"""Hidden states of rows at the end of their prompts, where a chat model has settled on whether it will refuse."""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agl_trl.data.alignment import AlignmentRow, batches, pad_token_id
from agl_trl.fisher.protected_rows import REFUSE
from agl_trl.modeling.generation import evaluating

from .setting import protected_rows


@torch.no_grad()
def prompt_states(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[AlignmentRow]) -> Tensor:
    """Outputs of all layers at the last token of every prompt, of shape `(layers, rows, d)`."""
    states = torch.empty(model.config.num_hidden_layers, len(rows), model.config.hidden_size)
    with evaluating(model):
        for batch in batches(rows, 64, pad_token_id(tokenizer), model.device):
            _, *layers = model(batch.input_ids, batch.attention_mask, output_hidden_states=True).hidden_states
            ends = torch.tensor([rows[i].answer_start - 1 for i in batch.indices])
            states[:, batch.indices] = torch.stack(layers)[:, torch.arange(len(ends)), ends].float()
    return states


def protected_states(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Tensor, Tensor]:
    """Those of the protected unsafe requests, and those of their look-alikes: the rows that AGL has."""
    rows, kinds = protected_rows(tokenizer, seed)
    states = prompt_states(model, tokenizer, rows)
    refused = torch.tensor([kind == REFUSE for kind in kinds])
    return states[:, refused], states[:, ~refused]


def middle(states: Tensor) -> Tensor:
    """The states of the middle layer."""
    return states[len(states) // 2]
