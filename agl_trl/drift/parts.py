"""What a report says of one update: its mean over layers, and its parts."""

import torch
from torch import Tensor

from ..objective.alignguard import Coefficients
from ..objective.collision import FrozenWeights, riemannian_overlap
from ..objective.decomposition import Update, critical_inner, critical_mask, project, subtract
from ..objective.quadratic_form import LayerMetric


OVERLAP_ROWS = 256


def mean_of_moved(drift: Tensor) -> Tensor:
    """
    Mean of the relative drifts of layers over those that are not 0, a scalar; 0 where no layer has moved. Which layers of a
    checkpoint were adapted is not known: this is the mean over the adapted ones, as training logs it, as soon as all have moved.
    """
    return drift.sum() / (drift > 0).sum().clamp_min(1)


def update_parts(update: Update, metric: LayerMetric, energy: float, weights: FrozenWeights) -> tuple[Tensor, Tensor]:
    """Alignment energy of one update and the overlap of its two parts."""
    mask = critical_mask(metric, energy)
    aligned = project(update, metric, mask)
    whole, critical, other = (Update(p.A[None], p.B[None]) for p in (update, aligned, subtract(update, aligned)))
    d_out = update.B.shape[-2]
    rows = torch.linspace(0, d_out - 1, min(d_out, OVERLAP_ROWS), device=update.B.device).round().long()
    shape = Coefficients(alignment=0.0, task=0.0)
    overlap = riemannian_overlap(
        whole, critical, other, weights, beta=shape.beta, threshold=shape.threshold, width=shape.width, rows=rows
    )
    return (critical_inner(update, update, metric, mask) / metric.weight_norm**2).cpu(), overlap.squeeze(0).cpu()
