"""The guard of one training run: which layers, which objective, budget and anchor; what a trainer calls at every step."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.alignment import is_prompt_only, pad_token_id, select_rows, tokenize_row
from ..fisher.statistics import FisherStatistics
from ..modeling.generation import answered_by
from ..modeling.lora import AdaptedLayer, frozen_weights, local
from ..objective.alignguard import AlignGuardObjective, Coefficients
from ..objective.budget import DriftBudget
from ..objective.paper import PaperObjective
from ..objective.quadratic_form import RelativeDrift
from .anchor import Anchor
from .config import AGLConfigMixin


class Guard:
    """
    Everything that is computed at a training step.

    Args:
        args ([`AGLConfigMixin`]):
            Training arguments.
        layers (`list[AdaptedLayer]`):
            Guarded layers.
        statistics ([`FisherStatistics`]):
            Statistics of the alignment rows.
        task_statistics ([`FisherStatistics`], *optional*):
            Statistics of the task's rows, where the coefficients need them.
        anchor ([`Anchor`], *optional*):
            Anchor, where there is one.
        multiplier (`float`, *optional*, defaults to `0.0`):
            Initial multiplier of the budget, to continue a run.
    """

    def __init__(
        self,
        args: AGLConfigMixin,
        layers: list[AdaptedLayer],
        statistics: FisherStatistics,
        task_statistics: FisherStatistics | None = None,
        anchor: Anchor | None = None,
        multiplier: float = 0.0,
    ):
        self.layers, self.anchor, self.anchor_coef = layers, anchor, args.anchor_coef
        factors = self.factors()
        self.objective: AlignGuardObjective | PaperObjective
        if args.variant == "paper":
            self.objective = PaperObjective([statistics.outputs[layer.name] for layer in layers], factors)
            self.drift = statistics.drift_of(layers)
        else:
            coefficients = coefficients_of(args)
            self.objective = AlignGuardObjective(
                coefficients,
                [statistics.kept_metric(layer.name) for layer in layers],
                factors,
                None if task_statistics is None else [task_statistics.kept_metric(layer.name) for layer in layers],
                frozen_weights(layers) if coefficients.needs_weights else None,
                seed=args.seed,
            )
            self.drift = RelativeDrift([stack.group for stack in self.objective.stacks])
        self.budget: DriftBudget | None = None
        if args.drift_budget is not None:
            self.budget = DriftBudget(args.drift_budget, factors[0].A.device, multiplier)

    def factors(self):
        """Current factors of all guarded layers."""
        return [layer.factors() for layer in self.layers]

    def terms(self, step: int) -> dict[str, Tensor]:
        """
        Terms at the current weights, scalars; `penalty` is what is added to the loss.

        Args:
            step (`int`):
                Number of the optimizer step, counted from 0.
        """
        factors = self.factors()
        terms = self.objective(factors, step)
        if "relative_drift" not in terms:
            with torch.no_grad():
                terms["relative_drift"] = self.drift(factors).mean()
        if self.budget is not None:
            terms["penalty"] = terms["penalty"] + self.budget.penalty(terms["relative_drift"])
            terms["budget_multiplier"] = self.budget.multiplier.clone()
        return terms

    def anchor_kl(self, model: PreTrainedModel | PeftModel, step: int) -> Tensor | None:
        """KL on this step's anchored rows, of which `anchor_coef` times is added to the loss; `None` where the step has none."""
        if self.anchor is None or not self.anchor.due(step):
            return None
        return self.anchor.loss(model, step)

    @torch.no_grad()
    def after_step(self) -> None:
        """After the optimizer has moved the weights: hold the budget."""
        if self.budget is not None:
            # A continued adapter can't be scaled back to where it started within its rank; the multiplier alone holds it.
            Bs = [local(layer.parameters()[1]) for layer in self.layers if layer.reference is None]
            self.budget.after_step(self.drift(self.factors()).mean(), Bs)


def coefficients_of(args: AGLConfigMixin) -> Coefficients:
    """Coefficients of the objective as the arguments give them."""
    alignment = args.alignment_coef or 0.0
    return Coefficients(
        alignment=alignment,
        task=alignment if args.task_coef is None else args.task_coef,
        task_metric=args.task_metric,
        task_subspace=args.task_subspace or "complement",
        collision=args.collision_coef,
        alpha=args.collision_alpha,
        beta=args.collision_beta,
        threshold=args.collision_threshold,
        width=args.collision_width,
        rows=args.collision_rows,
        fisher_energy=args.fisher_energy,
    )


def settings_of(args: AGLConfigMixin) -> dict[str, Any]:
    """What was switched on, for the metadata of a report."""
    if args.variant == "paper":
        return {"variant": "paper"}
    shown: dict[str, Any] = {"variant": args.variant, **asdict(coefficients_of(args))}
    if args.drift_budget is not None:
        shown["drift_budget"] = args.drift_budget
    if args.anchor_coef > 0:
        shown |= {name: getattr(args, name) for name in ("anchor_coef", "anchor_every", "anchor_batch_size")}
    return shown


def build_anchor(
    args: AGLConfigMixin,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | IterableDataset | Sequence[dict[str, Any]],
) -> Anchor:
    """Anchor on the rows of an alignment dataset, whose logits are cached; the model is at its reference weights."""
    rows = select_rows(dataset, args.fisher_num_samples, args.seed)
    if is_prompt_only(rows[0]):
        rows = answered_by(model, tokenizer, rows, not args.disable_tqdm)
    tokenized = [tokenize_row(row, tokenizer, args.max_length) for row in rows]
    pad = pad_token_id(tokenizer)
    return Anchor(model, tokenized, pad, args.anchor_every, args.anchor_batch_size, args.seed)
