"""
Supervised fine-tuning that is anchored on its own rows, as ASFT (anchored SFT, arXiv 2509.23753) is in LLaMA-Factory.

Means over the tokens of the answers that are trained on, with π₀ the model with its adapter off, which is the aligned one:

    L = E[ w · −log π(y_t) ] + α E[ KL(π₀ ‖ π)_t ],      w = 1 (`kl-sft`), or w = π(y_t) without its gradient (DFT, `dft-kl`)

Data it needs: none beside the task; a second forward pass.

Faithful: both means, the direction of the KL, the detached weight, α = 0.1 by default. Inferred: nothing of the loss; w = 1 is the
part that keeps, alone, which the source has too; rank, learning rate and layers are those of the comparison.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from trl import SFTConfig, SFTTrainer

from .setting import Setting, build, common


def token_losses(logits: Tensor, reference: Tensor, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """
    NLL and KL to the reference of every token that is trained on, each of shape `(tokens,)`.

    Args:
        logits (`Tensor`):
            Of shape `(batch, length, vocabulary)`.
        reference (`Tensor`):
            Those of the reference model.
        input_ids (`Tensor`):
            Of shape `(batch, length)`.
        labels (`Tensor`):
            -100 where nothing is trained.
    """
    mask = labels[:, 1:] != -100
    log_p, log_q = (part[:, :-1][mask].float().log_softmax(-1) for part in (logits, reference))
    nll = -log_p.gather(1, input_ids[:, 1:][mask][:, None]).squeeze(1)
    return nll, F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def anchored(nll: Tensor, kl: Tensor, coef: float, dft: bool = False) -> Tensor:
    """The loss of these tokens."""
    weight = (-nll).exp().detach() if dft else torch.ones_like(nll)
    return (weight * nll).mean() + coef * kl.mean()


class AnchoredTrainer(SFTTrainer):
    coef = 0.1
    dft = False

    def losses(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """[`token_losses`] of a batch."""
        passed = dict(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        with torch.no_grad(), self.model.disable_adapter():
            reference = self.model(**passed).logits
        return token_losses(self.model(**passed).logits, reference, inputs["input_ids"], inputs["labels"])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return anchored(*self.losses(inputs), self.coef, self.dft)


def kl_sft(coef: float = 0.1, dft: bool = False) -> Callable[[Setting], SFTTrainer]:
    """With α, and whether tokens are weighted by their probability."""

    def make(setting: Setting) -> SFTTrainer:
        trainer = build(AnchoredTrainer, SFTConfig(**common(setting, loss_type="nll")), setting)
        trainer.coef, trainer.dft = coef, dft
        return trainer

    return make
