"""Tensors that differ from those of the base model and are no LoRA factors."""

import torch
from torch import Tensor


def is_quantised(tensor: Tensor) -> bool:
    """Whether a tensor holds codes in place of numbers."""
    return not tensor.is_floating_point()


@torch.no_grad()
def same_but_for_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether either of two tensors is the other, rounded to its type: a checkpoint saved in another type has not moved."""
    if one.shape != other.shape or other.is_meta or one.is_meta:
        return False
    one = one.to(other.device)
    return torch.equal(one.to(other.dtype), other) or torch.equal(other.to(one.dtype), one)
