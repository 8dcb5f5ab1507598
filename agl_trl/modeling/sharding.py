"""Parameters that FSDP2 may have sharded."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(parameter: Tensor) -> Tensor:
    """A parameter, gathered where FSDP2 has sharded it; differentiable, and its gradient is not averaged over processes."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def local(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def put(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter a value, in place; of a sharded one, every process its part."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.data.copy_(value)
