"""What is added to the gradients of one training run, and what holds its drift: the objective, the budget and the anchor."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..fisher.statistics import FisherStatistics
from ..modeling.lora import AdaptedLayer, frozen_weights
from ..modeling.sharding import local, put, whole
from ..objective.alignguard import AlignGuardObjective, Coefficients
from ..objective.budget import DriftBudget
from ..objective.paper import PaperObjective
from ..objective.quadratic_form import InputSide, LoraFactors, RelativeDrift
from ..objective.trust_region import TrustRegion, step_within
from .config import AlignGuardConfig


class Regularizer:
    """
    Everything that is computed at a training step. Built when training begins, once the parameters are those that train.

    Args:
        config ([`AlignGuardConfig`]):
            What is switched on.
        layers (`list[AdaptedLayer]`):
            Layers whose movement counts.
        statistics ([`FisherStatistics`]):
            Statistics of the alignment rows.
        task_statistics ([`FisherStatistics`], *optional*):
            Statistics of the task's rows, where the coefficients need them.
        drift_budget (`float`, *optional*):
            Largest relative drift, where it is held.
        share_per_drift (`float`, *optional*):
            Share of the KL budget that a relative drift of 1 stands for, where a trust region is held.
        multiplier (`float`, *optional*, defaults to `0.0`):
            Initial multiplier of the drift budget, to continue a run.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the rows sampled for the Riemannian overlap.
    """

    def __init__(
        self,
        config: AlignGuardConfig,
        layers: list[AdaptedLayer],
        statistics: FisherStatistics,
        task_statistics: FisherStatistics | None = None,
        *,
        drift_budget: float | None = None,
        share_per_drift: float | None = None,
        multiplier: float = 0.0,
        seed: int = 0,
    ):
        self.config, self.layers = config, layers
        self.parameters = [parameter for layer in layers for parameter in layer.parameters()]
        # In-place updates reach these: gathered parts and movements from a reference must be made anew at every step.
        moving = any(layer.reference is not None for layer in layers)
        gathered = any(isinstance(parameter, DTensor) for parameter in self.parameters)
        self._factors = None if moving or gathered else [layer.factors() for layer in layers]
        factors = self.factors()
        coefficients = coefficients_of(config)
        self.objective: AlignGuardObjective | PaperObjective | None = None
        self.drift: RelativeDrift
        if config.variant == "paper":
            self.objective = PaperObjective([statistics.outputs[layer.name] for layer in layers], factors)
            self.drift = statistics.drift_of(layers)
        elif coefficients.complete:  # the relative drift itself, whose gradient has a closed form
            self.drift = statistics.drift_of(layers)
        else:
            self.objective = AlignGuardObjective(
                coefficients,
                [statistics.kept_metric(layer.name) for layer in layers],
                factors,
                None if task_statistics is None else [task_statistics.kept_metric(layer.name) for layer in layers],
                frozen_weights(layers) if coefficients.needs_weights else None,
                seed=seed,
            )
            self.drift = RelativeDrift([stack.group for stack in self.objective.stacks])  # statistics are held once
        self.alignment = torch.tensor(coefficients.alignment, device=factors[0].A.device)  # λ_A, for the complete form
        self.trust_region: TrustRegion | None = None
        if share_per_drift is not None and config.trust_radius is not None:
            self.trust_region = TrustRegion(
                config.trust_radius, torch.tensor(share_per_drift, device=self.alignment.device)
            )
        self._inputs: tuple[int, list[InputSide]] | None = None  # of the current A, and its version
        self.budget: DriftBudget | None = None
        if drift_budget is not None:
            self.budget = DriftBudget(drift_budget, factors[0].A.device, multiplier)

    def factors(self) -> list[LoraFactors]:
        """Current factors of all layers; under FSDP2 gathered from all processes, which all must ask."""
        return [layer.factors() for layer in self.layers] if self._factors is None else self._factors

    def terms(self, step: int) -> dict[str, Tensor]:
        """
        Terms at the current weights, scalars with a graph; `penalty` is what weighs on the weights.

        Args:
            step (`int`):
                Number of the optimizer step, counted from 0.
        """
        factors = self.factors()
        terms = {} if self.objective is None else self.objective(factors, step)
        if "relative_drift" not in terms:
            terms["relative_drift"] = self.drift(factors).mean()
        if self.objective is None:
            terms["penalty"] = self.alignment * terms["relative_drift"]
        if self.budget is not None:
            terms["penalty"] = terms["penalty"] + self.budget.penalty(terms["relative_drift"])
            terms["budget_multiplier"] = self.budget.multiplier.clone()
        return terms

    def gradients(self, step: int) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """
        [`terms`] without a graph, and the gradient of their penalty with respect to A and B of every layer in turn, if there is one.
        Nothing of it lives on during the model's forward and backward pass.
        """
        if self.objective is not None:
            terms = self.terms(step)
            gradients = torch.autograd.grad(
                terms["penalty"], self.parameters, allow_unused=True, materialize_grads=True
            )
            return {name: term.detach() for name, term in terms.items()}, gradients
        factors = self.factors()
        with torch.no_grad():
            inputs, outputs = self._input_sides(factors), self.drift.output_grams(factors)
            weight = self.alignment
            drift = self.drift.value(inputs, outputs).mean()
            terms = {"relative_drift": drift}
            if self.budget is not None:
                weight = weight + self.budget.weight()
                terms["budget_multiplier"] = self.budget.multiplier.clone()
            terms["penalty"] = weight * drift
            if self.budget is None and self.config.alignment_coef == 0:  # nothing weighs on the weights
                return terms, ()
            gradients = tuple(self.drift.gradients(factors, inputs, outputs, weight))
        if self._factors is None:  # from the movement to the parameters it is made of
            moved = [tensor for factor in factors for tensor in factor[:2]]
            given = [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, moved, strict=True)]
            gradients = torch.autograd.grad(moved, self.parameters, given)
        return terms, gradients

    def _input_sides(self, factors: list[LoraFactors]) -> list[InputSide]:
        """What [`hold`] has just computed of A, unless somebody has changed A since."""
        if self._inputs is not None and self._inputs[0] == self._version():
            return self._inputs[1]
        return self.drift.input_sides(factors)

    def _version(self) -> int:
        return sum(parameter._version for parameter in self.parameters[::2])

    @torch.no_grad()
    def hold(self) -> None:
        """After the optimizer has moved the weights: hold the trust region and the budget."""
        self._inputs = None  # of the weights before
        if self.trust_region is None and self.budget is None:
            return
        factors = self.factors()
        inputs = self.drift.input_sides(factors)
        if self.trust_region is not None:
            moving = self.layers[0].reference is not None
            steps = step_within(self.drift, factors, inputs, self.trust_region.limit(), continued=moving)
            for layer, step in zip(self.layers, steps, strict=True):
                B = layer.parameters()[1]
                put(B, whole(B) + (step / layer.module.scaling[layer.adapter] if moving else step))
            factors = self.factors()
        if self.budget is not None:
            drift = self.drift.value(inputs, self.drift.output_grams(factors)).mean()
            # A continued adapter can't be scaled back to where it started within its rank; the multiplier alone holds it.
            self.budget.after_step(
                drift, [local(layer.parameters()[1]) for layer in self.layers if layer.reference is None]
            )
        if self._factors is not None:  # A stays as it is, and the next step reads it again
            self._inputs = self._version(), inputs


def coefficients_of(config: AlignGuardConfig) -> Coefficients:
    """Coefficients of the objective as the configuration gives them."""
    alignment = config.alignment_coef or 0.0
    return Coefficients(
        alignment=alignment,
        task=alignment if config.task_coef is None else config.task_coef,
        task_metric=config.task_metric,
        task_subspace=config.task_subspace or "complement",
        collision=config.collision_coef,
        alpha=config.collision_alpha,
        beta=config.collision_beta,
        threshold=config.collision_threshold,
        width=config.collision_width,
        rows=config.collision_rows,
        fisher_energy=config.fisher_energy,
    )


def settings_of(config: AlignGuardConfig) -> dict[str, Any]:
    """What was switched on, for the metadata of a report."""
    if config.variant == "paper":
        return {"variant": "paper"}
    shown: dict[str, Any] = {"variant": config.variant, **asdict(coefficients_of(config))}
    for name in ("kl_budget", "drift_budget"):
        if (value := getattr(config, name)) is not None:
            shown[name] = value
    if config.anchored:
        names = ("anchor_coef", "anchor_every", "anchor_batch_size")
        shown |= {name: getattr(config, name) for name in (*names, *(("trust_radius",) if config.kl_budget else ()))}
    return shown
