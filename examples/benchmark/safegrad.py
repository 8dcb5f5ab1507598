"""
SafeGrad (arXiv 2508.07172): where the task's gradient conflicts with the alignment's, that component is taken out of it.

With g the gradient of the task and a that of the KL to the aligned model, both flat over all trained parameters, at every step:

    <g, a> < 0   ⇒   g ← g − (<g, a> / ‖a‖²) a,     and then   g ← g + ρ a

Data it needs: safety rows in the run, those that AGL has by default.

Faithful: the sign test, the projection of one vector over the whole model, KL as the alignment loss. Inferred: the direction of the KL,
from the aligned model to the tuned one, and its 16 rows a step to refuse and to answer; ρ = 0 (surgery alone) unless said. At the first step a is
zero, as B is, and g stays. Surgery comes after gradient clipping.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from agl_trl.fisher.reference_answers import ReferenceAnswers
from agl_trl.trainer.anchor import Anchor

from .setting import Setting, build, common, reference_answers


ROWS_PER_STEP = 16


def surgery(gradient: Sequence[Tensor], alignment: Sequence[Tensor], coef: float = 0.0) -> list[Tensor]:
    """
    The gradient, without what conflicts with the alignment's, and with `coef` times the latter.

    Args:
        gradient (`Sequence[Tensor]`):
            Of the task, a tensor for every parameter.
        alignment (`Sequence[Tensor]`):
            Of the alignment loss, of the same shapes.
        coef (`float`, *optional*, defaults to `0.0`):
            ρ.
    """
    pairs = list(zip(gradient, alignment, strict=True))
    inner = torch.stack([(g * a).sum() for g, a in pairs]).sum()
    squared = torch.stack([a.square().sum() for _, a in pairs]).sum()
    if inner < 0:  # so that the alignment's is not zero
        coef = coef - (inner / squared).item()
    return [g + coef * a for g, a in pairs]


class Surgery(TrainerCallback):
    """Before every step of the optimizer, over all parameters that are trained."""

    def __init__(self, references: ReferenceAnswers, coef: float, seed: int, rows: int = ROWS_PER_STEP):
        self.anchor, self.coef = Anchor(references, 1, rows, seed), coef

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parameters = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
        kl = self.anchor.kl(model, "alignment", state.global_step)[0]
        alignment = torch.autograd.grad(kl, parameters)
        changed = surgery([p.grad for p in parameters], alignment, self.coef)
        for parameter, gradient in zip(parameters, changed, strict=True):
            parameter.grad.copy_(gradient)


def safegrad(coef: float = 0.0) -> Callable[[Setting], SFTTrainer]:
    """With ρ."""

    def make(setting: Setting) -> SFTTrainer:
        trainer = build(SFTTrainer, SFTConfig(**common(setting)), setting)
        references = reference_answers(trainer.model, setting.tokenizer, setting.seed)
        trainer.add_callback(Surgery(references, coef, setting.seed))
        return trainer

    return make
