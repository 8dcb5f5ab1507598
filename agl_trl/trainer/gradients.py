"""How the gradient of AlignGuard's terms joins that of the task, right before the optimizer's step, whatever the engine."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..modeling.sharding import whole


def add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor], engine: Any = None) -> None:
    """
    Add gradients to those that the parameters have; to a parameter without one, they become it.

    Args:
        parameters (`Sequence[Tensor]`):
            Parameters that train.
        gradients (`Sequence[Tensor]`):
            One for each, the same on every process; none where nothing weighs on them.
        engine (`Any`, *optional*):
            DeepSpeed's optimizer, which keeps the gradients of its parameters itself, scaled where it trains in float16.
    """
    if not gradients:
        return
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


def gradient_of(value: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """
    Gradient of a value that is the same on every process, with respect to parameters, whose own gradients stay as they are.

    `torch.autograd.grad` fires no hook of DDP or DeepSpeed; its result is averaged, so that processes stay equal to the last bit. FSDP2
    gathers and frees its shards by hooks of the backward pass, so that it gets one.
    """
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return _averaged(torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True))
    held = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    value.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter, gradient in zip(parameters, held, strict=True):
        parameter.grad = gradient
    return gradients


def _averaged(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The mean over processes, in one message."""
    if PartialState().num_processes == 1:
        return list(gradients)
    flat = reduce(torch.cat([gradient.flatten().float() for gradient in gradients]), "mean")
    parts = flat.split([gradient.numel() for gradient in gradients])
    return [part.view_as(gradient).to(gradient.dtype) for part, gradient in zip(parts, gradients, strict=True)]


def add_capped(
    parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], weight: float, norm: Tensor, engine: Any = None
) -> None:
    """
    Add the weighted gradient of a few rows, at most as long as the gradient that is there: rows that have gone far would otherwise
    fill the optimizer's second moments, which forget slowly, and stop the task.

    Args:
        parameters (`Sequence[Parameter]`):
            Parameters that train.
        gradients (`Sequence[Tensor]`):
            One for each.
        weight (`float`):
            Weight of what they are the gradient of.
        norm (`Tensor`):
            Their norm.
        engine (`Any`, *optional*):
            DeepSpeed's optimizer.
    """
    limit = norm_of(_present(parameters, engine)) / norm.clamp_min(torch.finfo(torch.float32).tiny)
    factor = limit.to(norm.device).clamp_max(weight)
    add_gradients(
        parameters, [gradient * factor.to(gradient.device, gradient.dtype) for gradient in gradients], engine
    )


def _present(parameters: Sequence[Tensor], engine: Any) -> list[Tensor]:
    """The gradients that parameters have, without the loss scale of float16."""
    if engine is None:
        return [parameter.grad for parameter in parameters if parameter.grad is not None]
    from deepspeed.utils import safe_get_full_grad

    return [safe_get_full_grad(parameter) / getattr(engine, "loss_scale", 1.0) for parameter in parameters]


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all numbers of some tensors; of sharded ones, over all processes."""
    return whole(torch.nn.utils.get_total_norm(tensors)).float() if tensors else torch.zeros(())


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
