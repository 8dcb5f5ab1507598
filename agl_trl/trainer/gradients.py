"""How the gradient of AlignGuard's terms joins that of the task, right before the optimizer's step, whatever the engine."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .anchor import Anchor


def add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor], engine: Any = None) -> None:
    """
    Add gradients to those that the parameters have; to a parameter without one, they become it.

    Args:
        parameters (`Sequence[Tensor]`):
            Parameters that train.
        gradients (`Sequence[Tensor]`):
            One for each, the same on every process.
        engine (`Any`, *optional*):
            DeepSpeed's optimizer, which keeps the gradients of its parameters itself, scaled where it trains in float16.
    """
    if engine is not None:
        from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

        scale = getattr(engine, "loss_scale", 1.0)  # of optimizers that scale no loss, none
        for parameter, gradient in zip(parameters, gradients, strict=True):
            safe_set_full_grad(parameter, safe_get_full_grad(parameter) + scale * gradient)
        return
    plain = [(p.grad, g) for p, g in zip(parameters, gradients, strict=True) if p.grad is not None]
    if plain and all(held.dtype == new.dtype and not isinstance(held, DTensor) for held, new in plain):
        torch._foreach_add_(*map(list, zip(*plain, strict=True)))  # as torch's own optimizers: one call for all
    else:
        for held, new in plain:
            held.add_(new)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient.to(parameter.dtype)


def add_anchor(anchor: Anchor, model: PeftModel, step: int, weight: float, engine: Any = None) -> Tensor:
    """
    Add the gradient of `weight · KL` on a step's anchored rows, with respect to all that trains. Returns the KL.

    `torch.autograd.grad` fires no hook of DDP or DeepSpeed: every process has the same rows, and so the same gradient. FSDP2
    gathers and frees its shards by hooks of the backward pass, so that it gets one.
    """
    parameters: list[nn.Parameter] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kl = anchor.loss(model, step)
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        (weight * kl).backward()
    else:
        gradients = torch.autograd.grad(weight * kl, parameters, allow_unused=True, materialize_grads=True)
        add_gradients(parameters, gradients, engine)
    return kl.detach()


def unscale(optimizer: AcceleratedOptimizer, *, clipped: bool) -> None:
    """Take the loss scale of float16 out of the gradients; clipping, where there is any, has done so."""
    if optimizer.scaler is not None and not clipped:
        optimizer.scaler.unscale_(optimizer.optimizer)


def before_step_of_deepspeed(optimizer: AcceleratedOptimizer, add: Callable[[Any], None]) -> None:
    """
    Call a function before every step of DeepSpeed's optimizer: its engine steps inside `backward`, before the callbacks of the
    trainer hear of it. Its clipping comes after that, and covers what is added.
    """
    engine = optimizer.optimizer
    step = engine.step

    def with_gradients(*args: Any, **kwargs: Any) -> Any:
        add(engine)
        return step(*args, **kwargs)

    engine.step = with_gradients
