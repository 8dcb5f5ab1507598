"""The AlignGuard objective over all guarded layers: coefficients, terms, and what is skipped when it is not asked for. Torch alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .collision import FrozenWeights, geodesic_separation, riemannian_overlap
from .decomposition import Update, critical_inner, critical_mask, inner, project, subtract
from .quadratic_form import LayerGroup, LayerMetric, LoraFactors, grouped


TaskMetric = Literal["rest", "identity", "task"]
TaskSubspace = Literal["complement", "task"]


@dataclass(frozen=True)
class Coefficients:
    """
    Weights and shapes of the terms; symbols as in AlignGuard-LoRA.

    Args:
        alignment (`float`):
            λ_A.
        task (`float`):
            λ_T.
        task_metric (`str`):
            H of the task term: `"rest"` (of 𝓕, outside the alignment-critical subspace), `"identity"` (scaled to the mean
            eigenvalue of 𝓕) or `"task"` (Fisher of the task).
        task_subspace (`str`):
            ΔW_T: `"complement"` of ΔW_A, or `"task"`, its projection on the critical subspace of the task's Fisher.
        collision (`float`):
            λ_NC.
        alpha (`float`):
            α: share of the Riemannian overlap in the collision term; the rest is geodesic separation.
        beta, threshold, width (`float`):
            β, τ and T of the Riemannian overlap.
        rows (`int`, *optional*):
            Rows sampled per step for the Riemannian overlap; `None` takes all.
        fisher_energy (`float`):
            Share of `tr 𝓕` that spans the critical subspaces.
    """

    alignment: float
    task: float
    task_metric: TaskMetric = "rest"
    task_subspace: TaskSubspace = "complement"
    collision: float = 0.0
    alpha: float = 0.5
    beta: float = 4.0
    threshold: float = 1.0
    width: float = 0.25
    rows: int | None = None
    fisher_energy: float = 0.9

    @property
    def complete(self) -> bool:
        """Whether the terms add up to the complete quadratic form `λ_A ‖ΔW‖²_𝓕`, which needs no decomposition."""
        whole = self.task == self.alignment and self.task_metric == "rest" and self.task_subspace == "complement"
        return whole and self.collision == 0

    @property
    def needs_task_fisher(self) -> bool:
        return self.task_subspace == "task" or self.task_metric == "task"

    @property
    def needs_weights(self) -> bool:
        return self.collision > 0 and self.alpha > 0

    @property
    def needs_geodesic(self) -> bool:
        # Identically zero under the complement: nothing to compute.
        return self.collision > 0 and self.alpha < 1 and self.task_subspace == "task"


class _Stack(NamedTuple):
    group: LayerGroup
    masks: Tensor | None
    task_group: LayerGroup | None
    task_masks: Tensor | None
    weights: FrozenWeights | None


class AlignGuardObjective:
    """
    Penalty on the updates of all guarded layers,

        λ_A ‖ΔW_A‖²_𝓕/‖W‖²_𝓕 + λ_T ‖ΔW_T‖²_H/‖W‖²_𝓕 + λ_NC (α E_RM + (1 − α) E_geo),    means over layers,

    with layers of equal shape stacked and handled by one batched call. With the task's own subspace, the part of ΔW in
    neither subspace stays penalised with λ_A in 𝓕: nothing is left free to drift.

    Args:
        coefficients (`Coefficients`):
            Weights of the terms.
        metrics (`Sequence[LayerMetric]`):
            Metric of the alignment rows, one per layer.
        factors (`Sequence[LoraFactors]`):
            Factors of the same layers; only shapes, scalings and devices are read here.
        task_metrics (`Sequence[LayerMetric]`, *optional*):
            Metric of the task's rows, where the coefficients need it.
        weights (`FrozenWeights`, *optional*):
            Frozen weights of the same layers, where the coefficients need them.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the row sample.
    """

    def __init__(
        self,
        coefficients: Coefficients,
        metrics: Sequence[LayerMetric],
        factors: Sequence[LoraFactors],
        task_metrics: Sequence[LayerMetric] | None = None,
        weights: FrozenWeights | None = None,
        seed: int = 0,
    ):
        self.coefficients = coefficients
        self.num_layers = len(factors)
        self.device = factors[0].A.device
        self.seed = seed
        self.stacks = []
        for group in grouped(metrics, factors, task_metrics):
            device = group.scaling.device
            masks, task_group, task_masks, frozen = None, None, None, None
            if not coefficients.complete:
                masks = _masks([metrics[i] for i in group.indices], coefficients.fisher_energy, device)
            if coefficients.needs_task_fisher:
                assert task_metrics is not None
                of_task = [task_metrics[i] for i in group.indices]
                (task_group,) = grouped(of_task, [factors[i] for i in group.indices])
                task_masks = _masks(of_task, coefficients.fisher_energy, device)
            if coefficients.needs_weights:
                assert weights is not None
                index = torch.tensor(group.indices)
                frozen = FrozenWeights(
                    [weights.rows[i] for i in group.indices],
                    weights.rms[index].to(device),
                    weights.squared_norm[index].to(device),
                )
            self.stacks.append(_Stack(group, masks, task_group, task_masks, frozen))

    def __call__(self, factors: Sequence[LoraFactors], step: int = 0) -> dict[str, Tensor]:
        """
        Terms of the objective, as means over layers: scalars in float32 on the device of the first layer.

        Args:
            factors (`Sequence[LoraFactors]`):
                Current factors.
            step (`int`, *optional*, defaults to `0`):
                Number of the optimizer step, which decides the sampled rows, so that a resumed run draws the same.

        Returns:
            `dict[str, Tensor]`: `relative_drift` (complete form), `penalty` (their weighted sum), and where they are computed
            `alignment`, `task`, `neither`, `riemannian`, `geodesic`.
        """
        sums: dict[str, Tensor] = {}
        for stack in self.stacks:
            for name, values in self._terms(stack, factors, step).items():
                total = values.sum().to(self.device)
                sums[name] = sums[name] + total if name in sums else total
        terms = {name: total / self.num_layers for name, total in sums.items()}
        c = self.coefficients
        if c.complete:
            return terms | {"penalty": c.alignment * terms["relative_drift"]}
        weight = {
            "alignment": c.alignment,
            "task": c.task,
            "neither": c.alignment,
            "riemannian": c.collision * c.alpha,
            "geodesic": c.collision * (1 - c.alpha),
        }
        return terms | {"penalty": sum((weight[name] * terms[name] for name in terms if name in weight), self._zero())}

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.device)

    def _terms(self, stack: "_Stack", factors: Sequence[LoraFactors], step: int) -> dict[str, Tensor]:
        """Terms per layer of one stack, each of shape `(layers,)`."""
        group, masks, task_group, task_masks, frozen = stack
        c, metric = self.coefficients, group.metric
        task_metric = None if task_group is None else task_group.metric
        update = Update(
            torch.stack([factors[i].A for i in group.indices]).float(),
            torch.stack([factors[i].B for i in group.indices]).float() * group.scaling[:, None, None],
        )
        squared = metric.weight_norm**2
        total = inner(update, update, metric) / squared
        terms = {"relative_drift": total}
        if masks is None:
            return terms
        critical = critical_inner(update, update, metric, masks)
        terms["alignment"] = critical / squared
        if c.task_subspace == "complement" and c.task_metric == "rest" and frozen is None:
            terms["task"] = total - terms["alignment"]  # Pythagoras: the parts are orthogonal in 𝓕
            return terms
        aligned = project(update, metric, masks)
        task = complement = subtract(update, aligned)
        task_norm, shared = (
            (total - terms["alignment"]) * squared,
            torch.zeros_like(total),
        )  # ‖ΔW_T‖²_𝓕, ⟨ΔW_A, ΔW_T⟩_𝓕
        outside = task_norm  # what of ΔW_T is not critical for alignment
        if c.task_subspace == "task":
            assert task_metric is not None and task_masks is not None
            task = project(update, task_metric, task_masks)
            neither = subtract(complement, project(complement, task_metric, task_masks))
            terms["neither"] = inner(neither, neither, metric) / squared
            task_norm, shared = inner(task, task, metric), critical_inner(update, task, metric, masks)
            outside = task_norm - critical_inner(task, task, metric, masks)
        if c.task_metric == "rest":
            terms["task"] = outside / squared
        elif c.task_metric == "identity":
            terms["task"] = inner(task, task) * metric.mean_eigenvalue() / squared
        else:
            assert task_metric is not None
            terms["task"] = inner(task, task, task_metric) / squared
        if frozen is not None:
            rows = self._sample(update.B.shape[-2], step, update.B.device)
            terms["riemannian"] = riemannian_overlap(
                update, aligned, task, frozen, beta=c.beta, threshold=c.threshold, width=c.width, rows=rows
            )
        if c.needs_geodesic:
            terms["geodesic"] = geodesic_separation(shared, critical, task_norm, metric.weight_norm)
        return terms

    def _sample(self, d_out: int, step: int, device: torch.device) -> Tensor | None:
        rows = self.coefficients.rows
        if rows is None or rows >= d_out:
            return None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return torch.randperm(d_out, generator=generator)[:rows].to(device, non_blocking=True)


def _masks(metrics: list[LayerMetric], fisher_energy: float, device: torch.device) -> Tensor:
    return torch.stack([critical_mask(metric, fisher_energy) for metric in metrics]).to(device)
