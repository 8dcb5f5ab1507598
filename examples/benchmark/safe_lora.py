"""
Safe LoRA (Hsu et al., NeurIPS 2024, arXiv:2405.16833), post-hoc: where a trained update points away from what alignment did
to its layer, it is projected on it. Per layer, with `ΔW = s B A`:

    V = W_aligned − W_base,   C = V Vᵀ / ‖V‖_Frob,   cos = ⟨C B A, B A⟩ / (‖C B A‖ ‖B A‖),   cos ≤ τ  ⇒  B ← C B

Data it needs: the weights before alignment beside the aligned ones; no rows.

Faithful: C in the authors' fast form, the cosine, `cos ≤ τ` with τ = 0.5 or the n-th smallest cosine, B alone rewritten. Inferred: the exact
projector on the column space of V, which is everything where V has full rank as here, keeps its first directions only.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from agl_trl.miniworld import load_model
from agl_trl.modeling.lora import AdaptedLayer, adapted_layers, base_weight, linear_layers

from .setting import Setting, build, common


def alignment_matrix(V: Tensor, energy: float | None = None) -> Tensor:
    """
    C of one layer, of shape `(d_out, d_out)`.

    Args:
        V (`Tensor`):
            `W_aligned − W_base`, of shape `(d_out, d_in)`.
        energy (`float`, *optional*):
            By default the fast form `V Vᵀ/‖V‖_Frob`, which is no projector and rescales what it is applied to. A share of
            `‖V‖²_Frob` gives the projector `U_k U_kᵀ` on the fewest left singular vectors that hold it.
    """
    if energy is None:
        return V @ V.mT / V.norm()
    U, S, _ = torch.linalg.svd(V, full_matrices=False)
    held = S.square().cumsum(0) / S.square().sum()
    U = U[:, : int((held < energy).sum()) + 1]
    return U @ U.mT


def alignment_matrices(
    layers: list[AdaptedLayer], before: PreTrainedModel, energy: float | None = None
) -> Iterator[Tensor]:
    """C of every guarded layer, one at a time; the model before alignment has its layers under the same names."""
    base = linear_layers(before)
    for layer in layers:
        W = base_weight(layer.module).float()
        yield alignment_matrix(W - base_weight(base[layer.name]).float().to(W.device), energy)


def cosine(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """
    Cosine of the angle between `B₁ A₁` and `B₂ A₂` as vectors, without multiplying them out: `⟨B₁A₁, B₂A₂⟩` is the sum of
    `(B₁ᵀB₂) ∘ (A₁A₂ᵀ)`. Zero for an update of zero. Each pair is `(A, B)`, of shapes `(r, d_in)` and `(d_out, r)`.
    """

    def inner(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Tensor:
        return ((x[1].mT @ y[1]) * (x[0] @ y[0].mT)).sum()

    scale = (inner(first, first) * inner(second, second)).sqrt()
    return inner(first, second) / scale.clamp_min(torch.finfo(scale.dtype).tiny)


class SafeLoraTrainer(SFTTrainer):
    """Plain LoRA, projected when training has ended; the cosines stay in `cosines`, the projected layers in `projected`."""

    before: PreTrainedModel
    threshold: float = 0.5
    number: int | None = None
    energy: float | None = None

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        self.project()
        return result

    @torch.no_grad()
    def project(self) -> None:
        layers = adapted_layers(self.model)
        matrices = alignment_matrices(layers, self.before, self.energy)
        after = [C @ layer.parameters()[1].float() for layer, C in zip(layers, matrices, strict=True)]
        each = []
        for layer, CB in zip(layers, after, strict=True):
            A, B = layer.parameters()
            each.append(cosine((A.float(), CB), (A.float(), B.float())))
        self.cosines = torch.stack(each)
        limit = self.threshold if self.number is None else self.cosines.sort().values[self.number - 1]
        self.projected = self.cosines <= limit
        for layer, CB, chosen in zip(layers, after, self.projected, strict=True):
            if chosen:
                layer.parameters()[1].copy_(CB)


def safe_lora(
    threshold: float = 0.5, number: int | None = None, energy: float | None = None
) -> Callable[[Setting], SFTTrainer]:
    """
    Args:
        threshold (`float`, *optional*, defaults to `0.5`):
            τ: layers with a cosine at or below it are projected.
        number (`int`, *optional*):
            Number of layers to project, those with the smallest cosines, instead of a threshold.
        energy (`float`, *optional*):
            Projects exactly, as in [`alignment_matrix`].
    """

    def make(setting: Setting) -> SFTTrainer:
        trainer = build(SafeLoraTrainer, SFTConfig(**common(setting)), setting)
        trainer.before = load_model("base")
        trainer.threshold, trainer.number, trainer.energy = threshold, number, energy
        return trainer

    return make
