"""Collision terms between the alignment-critical and the task part of an update. Imports torch alone."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .decomposition import Update


# Elements of a dense row block: on a CPU a few of them fit its cache, on an accelerator they fill it.
BLOCK_ELEMENTS = {"cpu": 2**20}
ACCELERATOR_BLOCK_ELEMENTS = 2**26
GEODESIC_EPSILON = 1e-8


class FrozenWeights(NamedTuple):
    """
    Frozen weights of stacked layers, read by rows.

    Args:
        rows (`Sequence[Callable[[Tensor], Tensor]]`):
            Per layer, the function that gives the rows of W at some indices, of shape `(n, d_in)`.
        rms (`Tensor`):
            Root mean square of the entries of W, of shape `(layers,)`.
        squared_norm (`Tensor`):
            `‖W‖²_Frob`, of shape `(layers,)`.
    """

    rows: Sequence[Callable[[Tensor], Tensor]]
    rms: Tensor
    squared_norm: Tensor


def geodesic_separation(product: Tensor, aligned: Tensor, task: Tensor, weight_norm: Tensor) -> Tensor:
    """
    Squared cosine between the two parts,

        ⟨ΔW_A, ΔW_T⟩²_𝓕 / (‖ΔW_A‖²_𝓕 ‖ΔW_T‖²_𝓕 + ε ‖W‖⁴_𝓕),

    finite with a bounded gradient at ΔW = 0. Where ΔW_T is the complement of an eigenspace projection the two parts are
    orthogonal in every metric with those eigenvectors, and the term is identically zero.

    Args:
        product (`Tensor`):
            ⟨ΔW_A, ΔW_T⟩_𝓕.
        aligned, task (`Tensor`):
            ‖ΔW_A‖²_𝓕 and ‖ΔW_T‖²_𝓕.
        weight_norm (`Tensor`):
            ‖W‖_𝓕.

    Returns:
        `Tensor`: per layer, of shape `(...)`, between 0 and 1.
    """
    return product.square() / (aligned * task + GEODESIC_EPSILON * weight_norm**4)


def riemannian_overlap(
    update: Update,
    aligned: Update,
    task: Update,
    weights: FrozenWeights,
    *,
    beta: float,
    threshold: float,
    width: float,
    rows: Tensor | None = None,
) -> Tensor:
    """
    Coordinate-wise overlap of the two parts, weighted where the weight is large,

        Σ_ij η_ij |ΔW_A ∘ ΔW_T|_ij / ‖W‖²_Frob,    η_ij = 1 + β · σ((|W + ΔW|_ij / rms(W) − τ) / T).

    The only term that needs dense entries: made by row blocks, recomputed in the backward pass,
    or estimated from a sample of rows, times `d_out / len(rows)`, which is unbiased for uniformly drawn rows.

    Args:
        update, aligned, task (`Update`):
            ΔW, ΔW_A and ΔW_T of stacked layers.
        weights (`FrozenWeights`):
            W of the same layers.
        beta, threshold, width (`float`):
            β, τ in units of rms(W), and T.
        rows (`Tensor`, *optional*):
            Indices of the sampled rows, the same for all stacked layers; `None` takes all.

    Returns:
        `Tensor`: per layer, of shape `(layers,)`.
    """
    d_out, d_in = update.B.shape[-2], update.A.shape[-1]

    def block(chosen: Tensor, *tensors: Tensor) -> Tensor:
        whole, critical, other = Update(*tensors[:2]), Update(*tensors[2:4]), Update(*tensors[4:])
        delta = whole.B[..., chosen, :] @ whole.A
        W = torch.stack([read(chosen) for read in weights.rows])
        eta = 1 + beta * torch.sigmoid(((W + delta).abs() / weights.rms[:, None, None] - threshold) / width)
        parts = (critical.B[..., chosen, :] @ critical.A) * (other.B[..., chosen, :] @ other.A)
        return (eta * parts.abs()).sum((-2, -1))

    tensors = [tensor for part in (update, aligned, task) for tensor in (part.A, part.B)]
    if rows is not None:
        return block(rows, *tensors) * (d_out / len(rows)) / weights.squared_norm
    elements = BLOCK_ELEMENTS.get(update.A.device.type, ACCELERATOR_BLOCK_ELEMENTS)
    size = max(1, elements // (len(weights.rows) * d_in))
    total = torch.zeros_like(weights.rms)
    for chosen in torch.arange(d_out, device=update.A.device).split(size):
        total = total + checkpoint(block, chosen, *tensors, use_reentrant=False, preserve_rng_state=False)
    return total / weights.squared_norm
