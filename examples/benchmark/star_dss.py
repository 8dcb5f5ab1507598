"""
STAR-DSS (NeurIPS 2025, arXiv 2505.17196): a guard scores every partial answer, and what it finds unsafe is held to the reference model.

With s_t in [0, 1] for the answer up to token t (1 is safe) and π₀ the model with its adapter off:

    L = E[ s_t · −log π(y_t) + (1 − s_t) λ KL(π₀ ‖ π)_t ],      s_t = σ(b + log π₀(y_1…y_k) − log π_b(y_1…y_k)),   k = min(t, 5)

Data it needs: a guard; here the weights before alignment, π_b, beside the aligned ones.

Faithful: the loss, token by token. Inferred: λ = 1, and the guard. No guard model judges the texts of the embedded world, so s is the posterior
that an answer's beginning is the aligned model's and not that of the one before alignment, of which alignment took what is
unsafe; b = 5 are the prior's log-odds for benign rows. After five tokens s stays, as later ones tell the style of a new task more than safety.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from agl_trl.miniworld import load_model

from .kl_sft import AnchoredTrainer, token_losses
from .setting import Setting, build, common


FIRST_TOKENS = 5


def scores(log_ratio: Tensor, mask: Tensor, prior: float) -> Tensor:
    """
    s of every token of the answers, of shape `(tokens,)`, those of a batch in its order.

    Args:
        log_ratio (`Tensor`):
            `log π₀ − log π_b` of every token, of shape `(batch, length)`.
        mask (`Tensor`):
            Boolean, of the same shape: which belong to an answer.
        prior (`float`):
            b.
    """
    first = mask & (mask.cumsum(1) <= FIRST_TOKENS)
    return torch.sigmoid(prior + (log_ratio * first).cumsum(1))[mask]


def scored(nll: Tensor, kl: Tensor, score: Tensor, coef: float) -> Tensor:
    """The loss of these tokens."""
    return (score * nll + (1 - score) * coef * kl).mean()


class StarTrainer(AnchoredTrainer):
    """`before` is the model before alignment."""

    before: PreTrainedModel
    prior = 5.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return scored(*self.losses(inputs), self.guard(inputs), self.coef)

    @torch.no_grad()
    def guard(self, inputs: dict[str, Tensor]) -> Tensor:
        """s of the tokens of a batch."""
        passed = dict(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        with self.model.disable_adapter():
            aligned = self.model(**passed).logits
        before = self.before(**passed).logits
        mask = inputs["labels"][:, 1:] != -100
        nll, _ = token_losses(aligned, before, inputs["input_ids"], inputs["labels"])
        nll_before, _ = token_losses(before, aligned, inputs["input_ids"], inputs["labels"])
        log_ratio = torch.zeros(mask.shape, device=nll.device).masked_scatter(mask, nll_before - nll)
        return scores(log_ratio, mask, self.prior)


def star_dss(coef: float = 1.0) -> Callable[[Setting], SFTTrainer]:
    """With λ."""

    def make(setting: Setting) -> SFTTrainer:
        trainer = build(StarTrainer, SFTConfig(**common(setting, loss_type="nll")), setting)
        trainer.coef, trainer.before = coef, load_model("base").eval()
        return trainer

    return make
