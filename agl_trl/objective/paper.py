"""
The objective as published, as far as it is known from its abstract and re-implementations (the full text could not be
read). Kept so that anyone can see how it behaves; not the default. Imports torch alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .collision import GEODESIC_EPSILON, FrozenWeights, riemannian_overlap
from .covariance import LowRankCovariance
from .decomposition import Update, inner
from .quadratic_form import LoraFactors


ALIGNMENT, TASK, COLLISION = 0.25, 0.5, 0.1  # λ_A, λ_T, λ_NC
ALPHA, BETA, THRESHOLD, WIDTH = 0.5, 4.0, 0.01, 1.0  # α, β, τ; the sigmoid of η has unit width


class PaperObjective:
    """
    Published form: left projector `P_A = U Uᵀ` from the eigenvectors of the raw output-gradient covariance `G = U Λ Uᵀ`,
    plain sums over layers and entries, H = I,

        λ_A Σ_i Λ_i ‖u_iᵀ ΔW‖² + λ_T ‖(I − P_A) ΔW‖²
        + λ_NC (α Σ η |ΔW_A ∘ ΔW_T| + (1 − α) ⟨ΔW_A, ΔW_T⟩² / (‖ΔW_A‖² ‖ΔW_T‖²)),    η = 1 + β σ(|ΔW| − τ).

    The last term is zero, because the two parts are orthogonal; it is computed to be seen.

    Args:
        outputs (`Sequence[LowRankCovariance]`):
            G of every guarded layer, unshrunk.
        factors (`Sequence[LoraFactors]`):
            Factors of the same layers; only their devices are read here.
    """

    def __init__(self, outputs: Sequence[LowRankCovariance], factors: Sequence[LoraFactors]):
        self.outputs = [G.to(f.A.device, torch.float32) for G, f in zip(outputs, factors, strict=True)]

    def __call__(self, factors: Sequence[LoraFactors], step: int = 0) -> dict[str, Tensor]:
        """Terms, summed over layers, and their weighted sum `penalty`."""
        layers = [self._terms(factor, G) for factor, G in zip(factors, self.outputs, strict=True)]
        device = layers[0]["alignment"].device
        terms = {name: torch.stack([layer[name].to(device) for layer in layers]).sum() for name in layers[0]}
        collision = ALPHA * terms["riemannian"] + (1 - ALPHA) * terms["geodesic"]
        penalty = ALIGNMENT * terms["alignment"] + TASK * terms["task"] + COLLISION * collision
        return terms | {"penalty": penalty}

    @staticmethod
    def _terms(factor: LoraFactors, G: LowRankCovariance) -> dict[str, Tensor]:
        whole = Update(factor.A.float(), factor.B.float() * factor.scaling)
        UB = G.eigenvectors.mT @ whole.B  # (k, r)
        aligned = Update(whole.A, G.eigenvectors @ UB)
        task = Update(whole.A, whole.B - aligned.B)
        product, norms = inner(aligned, task), inner(aligned, aligned) * inner(task, task)
        one = torch.ones(1, device=UB.device)
        no_weight = FrozenWeights([lambda rows: whole.A.new_zeros(())], one, one)  # η looks at ΔW alone
        one_layer = [Update(update.A.unsqueeze(0), update.B.unsqueeze(0)) for update in (whole, aligned, task)]
        overlap = riemannian_overlap(
            one_layer[0],
            one_layer[1],
            one_layer[2],
            no_weight,
            beta=BETA,
            threshold=THRESHOLD,
            width=WIDTH,
        )
        return {
            "alignment": (G.eigenvalues * ((UB @ (whole.A @ whole.A.mT)) * UB).sum(1)).sum(),
            "task": inner(task, task),
            "riemannian": overlap.squeeze(0),
            "geodesic": product.square() / (norms + GEODESIC_EPSILON),
        }
