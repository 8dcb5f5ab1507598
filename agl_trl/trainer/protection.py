"""Holding behaviour: the anchored rows of a run, what holds their KL, and the guarantee at its end."""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast
from peft import PeftModel
from torch import Tensor

from ..fisher.reference_answers import ReferenceAnswers
from ..modeling.forward import evaluating
from ..modeling.lora import AdaptedLayer
from ..modeling.sharding import put, whole
from ..objective.kl import largest_scale, projection_step
from .anchor import Anchor
from .config import AlignGuardConfig
from .gradients import add_capped, gradient_of, norm_of


logger = get_logger(__name__)
AIM = 0.5  # share of the budget that a few rows are projected to: rows that were not visited lately have gone farther
RADIUS = 0.1  # longest step, relative to the norm of all B
MUCH = 0.5  # scale of the update at the end below which it is told


class Protection:
    """
    Protected behaviours of one run. Every anchored step measures the KL of a few rows of each. Their gradient joins that of the task,
    and where their KL exceeds half of the budget the weights are projected to where it does not, to first order. This has no state
    and no coefficient to steer, so that a resumed run goes on as it would have. At the end all rows are measured, and the update is
    shrunk until no budget is exceeded.

    Args:
        config ([`AlignGuardConfig`]):
            What is switched on.
        references ([`ReferenceAnswers`]):
            Answers of the reference model.
        layers (`list[AdaptedLayer]`):
            Layers of the adapter with their references.
        seed (`int`):
            Seed of the order of rows.
    """

    def __init__(self, config: AlignGuardConfig, references: ReferenceAnswers, layers: list[AdaptedLayer], seed: int):
        self.config, self.references, self.layers = config, references, layers
        self.behaviours = references.behaviours
        self.anchor = Anchor(references, config.anchor_every, config.anchor_batch_size, seed)
        self.scale: float | None = None  # by which the update was shrunk at the end
        self.measured: dict[str, Any] = {}  # of all rows, at the end
        self.budgets = budgets_of(config, self.behaviours)

    def forget(self) -> None:
        """What was measured at the end of an earlier training is of other weights."""
        self.measured, self.scale = {}, None

    def protect(self, model: PeftModel, step: int, engine: Any = None) -> dict[str, Tensor]:
        """
        At an anchored step, measure its rows of every behaviour, add their gradient to those that the parameters have, and take a
        step against it where their KL exceeds what is aimed at. Returns what is logged.

        Args:
            model (`PeftModel`):
                Model in training, right before the optimizer's step.
            step (`int`):
                Number of the step, counted from 0.
            engine (`Any`, *optional*):
                DeepSpeed's optimizer, which keeps its own copy of the weights: there is no such step, the gradient alone.
        """
        logged: dict[str, Tensor] = {}
        if not self.anchor.due(step):
            return logged
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        weight = self.config.anchor_coef or 0.0
        for behaviour in self.behaviours:
            suffix = "" if behaviour == self.behaviours[0] else f"_{behaviour}"
            # The backward pass too: a layer that FSDP wraps for its activation checkpointing runs again there.
            with evaluating(model):
                measured, first = self.anchor.kl(model, behaviour, step)
                gradients = gradient_of(measured, parameters)
            kl, norm = _of_main_process(measured.detach().float()), norm_of(gradients)
            sound = kl.isfinite() & norm.isfinite()  # else these rows are passed over: 0 · NaN would be NaN
            gradients = [torch.where(sound.to(gradient.device), gradient, 0) for gradient in gradients]
            norm = torch.where(sound, norm, 0)
            add_capped(parameters, gradients, weight, norm, engine)
            if self.budgets and engine is None:
                aim = AIM * self.budgets[behaviour]
                radius = RADIUS * norm_of([layer.parameters()[1].detach() for layer in self.layers])
                eta = projection_step(kl, aim, norm, radius.to(norm.device))
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.sub_(eta.to(gradient.device, gradient.dtype) * gradient)
                logged[f"kl_step{suffix}"] = eta * norm
            if self.budgets:  # of the behaviour that is nearest to its budget
                share = kl / self.budgets[behaviour]
                logged["kl_budget_share"] = torch.maximum(logged.get("kl_budget_share", share), share)
            logged |= {f"kl{suffix}": kl, f"kl_first_tokens{suffix}": first.detach()}
            logged["penalty"] = logged.get("penalty", 0) + weight * torch.where(sound, kl, 0)
        return logged

    @torch.no_grad()
    def hold(self, model: PeftModel) -> None:
        """
        Measure all protected rows and shrink the update until none of the budgets is exceeded.

        Args:
            model (`PeftModel`):
                Model as trained.
        """
        if not self.budgets:
            return
        move_to = scaling(self.layers)

        def excess(scale: float) -> float:
            move_to(scale)
            self.measured = self._measure(model)
            shares = [self.measured[name]["kl"] / budget for name, budget in self.budgets.items()]
            return torch.tensor(shares).max().item()  # no number if any of them is none

        self.scale = largest_scale(excess)
        if self.scale == 0:
            move_to(1.0)
            self.scale, self.measured = 1.0, self._measure(model)
            reason = "what was trained beside LoRA exceeds it by itself"
            if not _known(self.measured):
                reason = "the KL is no number, whatever the scale of the update"
            logger.warning(f"The KL budget is not held: {reason}.")
        elif self.scale < MUCH:
            logger.warning(
                f"The update was shrunk to {self.scale:.0%} of itself to keep the KL budget, which takes what it learned of the task "
                "too: a smaller `trust_radius` or learning rate keeps a run near its budget (`agl/kl` in the log), a larger `kl_budget` "
                "shrinks less."
            )

    def _measure(self, model: PeftModel) -> dict[str, Any]:
        kl = _of_main_process(self.references.kl(model).float()).cpu()
        found = {}
        for name in self.behaviours:
            rows = self.references.where(name)
            kinds = sorted({self.references.kinds[i] for i in rows} - {name})
            found[name] = {
                "kl": kl[rows, 0].mean().item(),
                "kl_first_tokens": kl[rows, 1].mean().item(),
                "rows": len(rows),
                "kinds": {k.split("/")[1]: kl[self.references.where(k), 0].mean().item() for k in kinds},
            }
        return found

    def described(self) -> dict[str, Any]:
        """What a report says of it."""
        measured = self.measured if _known(self.measured) else {}
        behaviours = {name: {"budget": self.budgets.get(name), **measured.get(name, {})} for name in self.behaviours}
        return {"behaviours": behaviours, "scale": self.scale}


def budgets_of(config: AlignGuardConfig, behaviours: list[str]) -> dict[str, float]:
    """
    KL budget of every protected behaviour; none without a `kl_budget`.

    Raises:
        `ValueError`: If one is given for what is not protected.
    """
    given = config.kl_budgets if isinstance(config.kl_budgets, dict) else {}
    if unknown := {*given} - {*behaviours}:
        raise ValueError(f"`kl_budgets` names '{min(unknown)}', but what is protected is {', '.join(behaviours)}.")
    budget = config.kl_budget
    return {} if budget is None else {name: given.get(name, budget) for name in behaviours}


def scaling(layers: list[AdaptedLayer]) -> Callable[[float], None]:
    """
    A function that moves the update of LoRA layers, and of what is trained beside them where its start is known, to a share of
    itself: `B ← cB`, and of a continued adapter both factors on the straight line from where they started.
    """
    ends: list[tuple[Tensor, Tensor | None]] = []
    for layer in layers:
        A, B = layer.parameters()
        if layer.reference is None:
            ends.append((B, None))
        else:
            ends += [(A, layer.reference.A), (B, layer.reference.B)]
    if layers[0].reference is not None:
        ends += [(beside.parameter(), beside.reference) for beside in layers[0].beside if beside.reference is not None]
    kept = [whole(parameter).detach().clone() for parameter, _ in ends]

    def move_to(scale: float) -> None:
        for (parameter, start), end in zip(ends, kept, strict=True):
            begin = torch.zeros_like(end) if start is None else start.to(end)
            put(parameter, end if scale == 1 else torch.lerp(begin.float(), end.float(), scale).to(end.dtype))

    return move_to


def _known(measured: dict[str, Any]) -> bool:
    return all(math.isfinite(found["kl"]) for found in measured.values())


def _of_main_process(tensor: Tensor) -> Tensor:
    """A measurement as the main process has it, so that all of them steer alike, to the last bit."""
    return broadcast(tensor.contiguous())
