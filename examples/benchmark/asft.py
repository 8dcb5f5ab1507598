"""
AsFT (arXiv 2506.08473): a penalty on the part of the update that leaves the alignment direction.

`L = L_task + λ Σ_ℓ ‖(I − C_ℓ) B_ℓ A_ℓ‖²_Frob` with `C = V Vᵀ / ‖V‖_Frob` and `V = W_aligned − W_base`, both of shape
`(d_out, d_in)`; C is no projector. Computed as `(I − C) B A = (B − V (Vᵀ B) / ‖V‖_Frob) A`, whose norm needs matrices of rank r
only: `‖D A‖² = tr(DᵀD A Aᵀ)`.

Faithful: the loss, C, the unscaled `B A` (without α/r), λ = 1. Inferred: nothing of the loss; rank, learning rate and layers are
those of the comparison, and V comes from the embedded checkpoints.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from agl_trl.miniworld import load_model
from agl_trl.modeling.lora import adapted_layers

from .setting import Setting, build, common


def off_alignment(A: Tensor, B: Tensor, V: Tensor) -> Tensor:
    """`‖(I − V Vᵀ / ‖V‖_Frob) B A‖²_Frob`, for A of shape `(r, d_in)` and B of shape `(d_out, r)`."""
    D = B - V @ (V.mT @ B) / V.norm()
    return ((D.mT @ D) * (A @ A.mT)).sum()


class AsftTrainer(SFTTrainer):
    """`directions` holds V of every layer by name."""

    directions: dict[str, Tensor]
    coef = 1.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            return loss
        layers = adapted_layers(self.model)
        return (
            loss
            + self.coef
            * torch.stack([off_alignment(*layer.parameters(), self.directions[layer.name]) for layer in layers]).sum()
        )


def asft(coef: float = 1.0) -> Callable[[Setting], SFTTrainer]:
    """With λ."""

    def make(setting: Setting) -> SFTTrainer:
        trainer = build(AsftTrainer, SFTConfig(**common(setting)), setting)
        base = dict(load_model("base").named_modules())
        trainer.coef, trainer.directions = coef, {}
        for layer in adapted_layers(trainer.model):
            aligned = layer.module.get_base_layer().weight
            trainer.directions[layer.name] = (aligned - base[layer.name].weight).detach()
        return trainer

    return make
