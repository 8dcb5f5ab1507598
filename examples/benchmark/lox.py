"""
LoX, low-rank extrapolation (Perin et al., COLM 2025, arXiv:2506.15606): before fine-tuning, the aligned model goes further in
the main directions of its alignment. For every matrix of the model:

    V = W_aligned − W_base = U S Qᵀ,   W_LoX = W_aligned + c · U_k S_k Q_kᵀ        (k = 0 takes all of V)

Data it needs: the weights before alignment beside the aligned ones; no rows.

Faithful: the formula for every 2-D tensor, embeddings included, vectors left alone, k = 6 and c = 1.25 of the paper, k = 0 and c = 1 of the code. Inferred:
LoRA instead of full fine-tuning; the result is written as an adapter of rank k + r of the aligned model, so that the drift counts the extrapolation.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from agl_trl.miniworld import load_model
from agl_trl.modeling.lora import adapted_layers, linear_layers

from .setting import Setting, adapted, build, common


def extrapolation(V: Tensor, rank: int, coef: float) -> tuple[Tensor, Tensor]:
    """
    Factors of `c · U_k S_k Q_kᵀ`.

    Args:
        V (`Tensor`):
            `W_aligned − W_base`, of shape `(d_out, d_in)`.
        rank (`int`):
            k; 0 takes all singular values.
        coef (`float`):
            c.

    Returns:
        `tuple[Tensor, Tensor]`: `Q_kᵀ` of shape `(k, d_in)` and `c U_k S_k` of shape `(d_out, k)`.
    """
    U, S, Qt = torch.linalg.svd(V, full_matrices=False)
    k = rank or len(S)
    return Qt[:k], coef * U[:, :k] * S[:k]


@torch.no_grad()
def extrapolations(rank: int, coef: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors for every matrix of the embedded model, by the name of its parameter; tied ones appear once."""
    base = dict(load_model("base").named_parameters())
    return {
        name: extrapolation(weight - base[name], rank, coef)
        for name, weight in load_model().named_parameters()
        if weight.ndim == 2
    }


@torch.no_grad()
def shift(model: PreTrainedModel, updates: dict[str, tuple[Tensor, Tensor]]) -> PreTrainedModel:
    """Add `B A` to parameters by name."""
    for name, (A, B) in updates.items():
        model.get_parameter(name).add_(B @ A)
    return model


class LoxTrainer(SFTTrainer):
    """Plain LoRA on the extrapolated model; at the end one adapter of the aligned model with both movements."""

    updates: dict[str, tuple[Tensor, Tensor]]

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        self.model = self.on_aligned()
        return result

    @torch.no_grad()
    def on_aligned(self):
        """`[sB, c U_k S_k] [A; Q_kᵀ]` on the aligned model. Embeddings, which no adapter has, stay shifted in its base."""
        whole = {}
        for layer in adapted_layers(self.model):
            (A, B, s), (right, left) = layer.current(), self.updates[f"{layer.name}.weight"]
            whole[layer.name] = torch.cat([A, right]), torch.cat([s * B, left], 1)
        clean = load_model()
        linear = {f"{name}.weight" for name in linear_layers(clean)}
        return adapted(shift(clean, {n: update for n, update in self.updates.items() if n not in linear}), whole)


def lox(rank: int = 6, coef: float = 1.25) -> Callable[[Setting], SFTTrainer]:
    """
    Args:
        rank (`int`, *optional*, defaults to `6`):
            k; 0 takes all.
        coef (`float`, *optional*, defaults to `1.25`):
            c.
    """

    def make(setting: Setting) -> SFTTrainer:
        updates = extrapolations(rank, coef)
        trainer = build(LoxTrainer, SFTConfig(**common(setting)), setting, model=shift(load_model(), updates))
        trainer.updates = updates
        return trainer

    return make
