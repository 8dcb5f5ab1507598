"""
Gradient projection: what the task's gradient would do to the safety rows is taken out of it before the optimizer's step.

- `spf` (after SPF, arXiv 2601.10141): every N steps the gradient G_s of the refusals' NLL, per matrix; U_k are its k leading left
  singular vectors. If `<G_u, G_s> < 0`, then `G_u ← G_u − U_k U_kᵀ G_u`, else G_u stays.
- `ogpsa` (after OGPSA, arXiv 2602.07892): `g ← g − <g, u₁> u₁ − <g, u₂> u₂` per tensor, whatever the sign, with u₁, u₂ the
  gradients of two reference sets made orthonormal, taken anew every 30 steps of SFT, every 5 of DPO.

Faithful: both equations, OGPSA's refresh. Inferred: SPF has no published code: k = 1 ("low-rank"), N = 10, 16 rows instead of
one, and both LoRA factors as the matrices. OGPSA protects ability while safety is trained; here its references are safety rows,
refusals and help with look-alikes, 64 of each instead of 200. Projection comes after gradient clipping.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOTrainer, SFTTrainer

from agl_trl.data.alignment import AlignmentRow, batches, tokenize_rows
from agl_trl.miniworld import alignment_dataset

from .setting import Setting, batch_nll, build, common


def spf(gradient: Tensor, safety: Tensor, k: int = 1) -> Tensor:
    """`G_u − U_k U_kᵀ G_u` where it conflicts with G_s, both of shape `(m, n)`; G_u otherwise."""
    if (gradient * safety).sum() >= 0:
        return gradient
    U = torch.linalg.svd(safety, full_matrices=False).U[:, :k]
    return gradient - U @ (U.mT @ gradient)


def ogpsa(gradient: Tensor, *references: Tensor) -> Tensor:
    """`g − Σ <g, u_i> u_i` with u_i the references made orthonormal (Gram-Schmidt), all of one shape."""
    directions: list[Tensor] = []
    for reference in references:
        for u in directions:
            reference = reference - (reference * u).sum() * u
        norm = reference.norm()
        if norm > 0:  # at the start B is 0, and so is the gradient of A
            directions.append(reference / norm)
    for u in directions:
        gradient = gradient - (gradient * u).sum() * u
    return gradient


class Project(TrainerCallback):
    """Projects the gradient of every trained tensor; `sets` are the tokenized reference sets."""

    def __init__(self, project: Callable[..., Tensor], sets: list[list[AlignmentRow]], every: int, pad: int):
        self.project, self.sets, self.every, self.pad = project, sets, every, pad

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parameters = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
        if state.global_step % self.every == 0:
            self.references = [self.gradients(model, parameters, rows) for rows in self.sets]
        for i, parameter in enumerate(parameters):
            parameter.grad.copy_(self.project(parameter.grad, *(reference[i] for reference in self.references)))

    def gradients(self, model, parameters: list[Tensor], rows: list[AlignmentRow]) -> tuple[Tensor, ...]:
        """Gradient of the mean NLL per answer token."""
        (batch,) = batches(rows, len(rows), self.pad, model.device)
        return torch.autograd.grad(batch_nll(model, batch), parameters)


def spf_projection(k: int = 1, every: int = 10) -> Callable[[Setting], SFTTrainer | DPOTrainer]:
    """With k and N."""

    def make(setting: Setting) -> SFTTrainer | DPOTrainer:
        refusals, _ = reference_rows(setting)
        return _projecting(setting, partial(spf, k=k), [refusals[:16]], every)

    return make


def ogpsa_projection(every: int | None = None) -> Callable[[Setting], SFTTrainer | DPOTrainer]:
    """With the number of steps after which the references are taken anew."""

    def make(setting: Setting) -> SFTTrainer | DPOTrainer:
        sets = [part[:64] for part in reference_rows(setting)]
        return _projecting(setting, ogpsa, sets, every or (5 if setting.preferences else 30))

    return make


def reference_rows(setting: Setting) -> list[list[AlignmentRow]]:
    """Refusals and help with look-alikes, tokenized."""
    rows = alignment_dataset().shuffle(seed=setting.seed)
    return [tokenize_rows([row for row in rows if row["unsafe"] is kind], setting.tokenizer) for kind in (True, False)]


def _projecting(
    setting: Setting, project: Callable[..., Tensor], sets: list[list[AlignmentRow]], every: int
) -> SFTTrainer | DPOTrainer:
    trainer_class, config_class = setting.plain
    trainer = build(trainer_class, config_class(**common(setting)), setting)
    trainer.add_callback(Project(project, sets, every, setting.tokenizer.pad_token_id))
    return trainer
