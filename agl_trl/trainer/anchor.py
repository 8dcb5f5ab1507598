"""The anchor: a few alignment rows now and then, as KL to cached logits of the reference model. For hostile data."""

from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..data.alignment import AlignmentRow, batches
from ..modeling.generation import answer_logits, evaluating, input_device


TOP_K = 32


class _Reference(NamedTuple):
    indices: Tensor  # (answer tokens, k), most likely next tokens of the reference model
    log_probs: Tensor  # (answer tokens, k)


class Anchor:
    """
    KL divergence from the reference model on alignment rows, over their answer tokens,

        KL(p_ref ‖ p) ≈ Σ_top p_ref log(p_ref / p) + r_ref log(r_ref / r),

    where the k = 32 most likely tokens of the reference are kept and `r` is what is left of either distribution: a lower
    bound that is exact in the kept tokens. The reference is run once, before training; there is no second model.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Model at its reference weights.
        rows (`list[AlignmentRow]`):
            Rows to anchor on.
        pad_token_id (`int`):
            Padding token.
        every (`int`):
            Optimizer steps between two anchored ones.
        batch_size (`int`):
            Rows per anchored step.
        seed (`int`):
            Seed of the order of rows.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        rows: list[AlignmentRow],
        pad_token_id: int,
        every: int,
        batch_size: int,
        seed: int,
    ):
        self.rows, self.pad_token_id, self.every, self.batch_size = (
            rows,
            pad_token_id,
            every,
            min(batch_size, len(rows)),
        )
        self.order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        self.references: dict[int, _Reference] = {}
        with evaluating(model), torch.no_grad():
            for batch in batches(rows, 8, pad_token_id, input_device(model)):
                logits, mask = answer_logits(model, batch)
                for line, index in enumerate(batch.indices):
                    log_probs = logits[line, mask[line]].float().log_softmax(-1)
                    top = log_probs.topk(min(TOP_K, log_probs.shape[-1]))
                    self.references[index] = _Reference(top.indices, top.values)

    def due(self, step: int) -> bool:
        """Whether the optimizer step with this number, counted from 0, is an anchored one."""
        return step % self.every == 0

    def loss(self, model: PreTrainedModel | PeftModel, step: int) -> Tensor:
        """
        Mean KL per answer token on this step's rows, in nats. Which rows is a function of the step alone, so that a resumed
        run goes on where it stopped.
        """
        start = step // self.every * self.batch_size
        indices = [self.order[(start + i) % len(self.order)] for i in range(self.batch_size)]
        chosen = [self.rows[i] for i in indices]
        (batch,) = batches(chosen, len(chosen), self.pad_token_id, input_device(model))
        logits, mask = answer_logits(model, batch)
        total, count = torch.zeros((), device=logits.device), 0
        for line, position in enumerate(batch.indices):
            reference = self.references[indices[position]]
            tuned = logits[line, mask[line]].float().log_softmax(-1)
            total = total + _top_kl(reference, tuned).sum()
            count += len(tuned)
        return total / count


def _top_kl(reference: _Reference, log_probs: Tensor) -> Tensor:
    """KL per token, of shape `(tokens,)`, of the distributions over k + 1 outcomes: the kept tokens, and any other."""
    kept = log_probs.gather(1, reference.indices)
    p = reference.log_probs.exp()
    tail_ref = (1 - p.sum(1)).clamp_min(1e-6)
    tail = (1 - kept.exp().sum(1)).clamp_min(1e-6)
    return (p * (reference.log_probs - kept)).sum(1) + tail_ref * (tail_ref.log() - tail.log())
