"""
SPLoRA, safety-pruning LoRA (Ao et al., 2025, arXiv:2506.18931), post-hoc: layers whose trained update is unlike its projection
on the alignment matrix are removed. Per layer, with `C = V Vᵀ/‖V‖_Frob` as in Safe LoRA:

    d = ‖C B A − B A‖_Frob,   E-DIEM = (d − E[d]) / IQR[d],   score = −E-DIEM,   score ≤ cutoff  ⇒  B ← 0

Data it needs: the weights before alignment beside the aligned ones; no rows.

Faithful: C, the distance standardised by an empirical mean and quartile range, layers at or below a cutoff zeroed. Inferred: the distances behind E[d] and IQR[d] are those
to `C B A` with its rows permuted (the released code takes 50 equal ones, so that d cancels out), the sign, by which unlike layers go first, and the number of layers removed.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from agl_trl.miniworld import load_model
from agl_trl.modeling.lora import adapted_layers

from .safe_lora import alignment_matrices, cosine
from .setting import Setting, build, common


def ediem(projected: Tensor, update: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """
    `(d − E[d]) / IQR[d]`: how far an update is from its projection, against what chance gives. The more negative, the more alike.

    Args:
        projected (`Tensor`):
            `C B A`, of shape `(d_out, d_in)`.
        update (`Tensor`):
            `B A`, of the same shape.
        samples (`int`):
            Number of permutations of the rows of `C B A` that E[d] and IQR[d] are taken over.
        generator (`torch.Generator`):
            Source of the permutations.
    """
    orders = [torch.randperm(len(update), generator=generator) for _ in range(samples)]
    chance = torch.stack([(projected[order] - update).norm() for order in orders])
    low, high = chance.quantile(torch.tensor([0.25, 0.75], dtype=chance.dtype))
    # An update of zero is at distance zero whatever the permutation; it scores 0.
    return ((projected - update).norm() - chance.mean()) / (high - low).clamp_min(torch.finfo(chance.dtype).tiny)


class SploraTrainer(SFTTrainer):
    """Plain LoRA, pruned when training has ended; the scores stay in `scores`, the removed layers in `pruned`."""

    number: int = 10
    score: Literal["ediem", "cosine"] = "ediem"
    samples: int = 50

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        self.prune()
        return result

    @torch.no_grad()
    def prune(self) -> None:
        layers, scores = adapted_layers(self.model), []
        generator = torch.Generator().manual_seed(self.args.seed)
        for layer, C in zip(layers, alignment_matrices(layers, load_model("base")), strict=True):
            A, B = layer.parameters()
            if self.score == "cosine":
                scores.append(cosine((A, C @ B), (A, B)))
            else:
                scores.append(-ediem(C @ B @ A, B @ A, self.samples, generator))
        self.scores = torch.stack(scores)
        self.pruned = self.scores <= self.scores.sort().values[self.number - 1]
        for layer, chosen in zip(layers, self.pruned, strict=True):
            if chosen:
                layer.parameters()[1].zero_()


def splora(number: int = 10, score: Literal["ediem", "cosine"] = "ediem") -> Callable[[Setting], SFTTrainer]:
    """
    Args:
        number (`int`, *optional*, defaults to `10`):
            Number of layers to remove, those with the smallest scores.
        score (`str`, *optional*, defaults to `"ediem"`):
            `"cosine"` scores as Safe LoRA does: a control of what the standardised distance adds.
    """

    def make(setting: Setting) -> SFTTrainer:
        trainer = build(SploraTrainer, SFTConfig(**common(setting)), setting)
        trainer.number, trainer.score = number, score
        return trainer

    return make
