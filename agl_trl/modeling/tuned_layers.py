"""What an adapter of any PEFT method changes, layer by layer: asked of the layer itself, so that every method is one case."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .names import named_modules
from .trained_tensors import relative_change


PROBES = 64  # random inputs on which a layer must be linear
LINEAR = 1e-3  # largest deviation from that, over the size of the outputs
ROUNDING = 1e-6  # of a weight: a smaller change of it is none
# Methods of which what a layer does depends on other layers or on what is asked, so that there is no one ΔW.
NOT_BY_LAYER = ("POLY", "SHADOW", "XLORA")


class LayerChange(NamedTuple):
    """
    What an adapter does to one layer.

    Args:
        weight (`Tensor`, *optional*):
            Frozen weight W of shape `(d_out, d_in)`, float32; `None` where the layer is no linear map with the adapter on.
        delta (`Tensor`, *optional*):
            ΔW of the same shape; exactly zero where it is less than rounding.
        others (`dict[str, float]`):
            What else changes, by the end of its name, each with the norm of its change over its own: a bias, the tensors of a
            layer that is not linear.
    """

    weight: Tensor | None
    delta: Tensor | None
    others: dict[str, float]


def tuned_layers(model: PeftModel, adapter: str) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Layers that an adapter changes, by name in the base model, without those that hold rows of `trainable_token_indices`."""
    for name, module in named_modules(model.get_base_model()):
        beside = name.rpartition(".")[2] == "token_adapter"  # a tensor that is trained beside the layers
        if isinstance(module, BaseTunerLayer) and not beside and adapter in module._get_available_adapters():
            yield name, module


def is_linear(module: nn.Module) -> bool:
    """Whether a layer, or the one inside PEFT's wrapper, is linear by class."""
    inside = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(inside, nn.Linear | Conv1D)


def tuned_linear_layers(model: PeftModel, adapter: str) -> dict[str, nn.Module]:
    """Linear layers that an adapter changes, by name in the base model; none where there is no one ΔW of a layer."""
    config: Any = model.peft_config[adapter]
    if config.peft_type in NOT_BY_LAYER or (config.peft_type == "LORA" and config.alora_invocation_tokens):
        return {}
    return {name: module for name, module in tuned_layers(model, adapter) if is_linear(module)}


def no_weights(model: PeftModel, adapter: str) -> str:
    """Why there is no drift of weights for an adapter, half a sentence."""
    config: Any = model.peft_config[adapter]
    if config.peft_type == "LORA" and config.alora_invocation_tokens:
        return "an activated LoRA acts on a part of the tokens alone"
    if config.peft_type in NOT_BY_LAYER:
        return f"what an adapter of type {config.peft_type.value} does to a layer depends on what is asked"
    return f"this adapter, of type {config.peft_type.value}, changes no linear layer by a matrix"


@torch.no_grad()
def layer_change(module: BaseTunerLayer, weight: Tensor | None = None) -> LayerChange:
    """
    What the active adapter does to a layer. A linear layer is applied to the identity, with the adapter on and off, in
    float32: the difference is ΔW, whatever the method, without the rounding of a merge. This is exact; PEFT's conversion to LoRA
    is the singular value decomposition of the same matrix. Other layers are merged, in a copy, and their tensors compared.

    Args:
        module (`BaseTunerLayer`):
            PEFT's wrapper around the layer; left as it was.
        weight (`Tensor`, *optional*):
            Weight of a quantised linear layer, dequantised: such a layer rounds its inputs.
    """
    tuned: Any = deepcopy(module).float().eval()
    if weight is not None:
        tuned.base_layer = _plain_linear(weight, tuned.get_base_layer().bias)
    if not is_linear(module):
        return LayerChange(None, None, _merged_change(tuned))
    frozen = deepcopy(tuned)
    frozen.enable_adapters(False)
    layer: Any = tuned.get_base_layer()
    size, device = (layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.in_features), layer.weight.device
    before, after = (_affine(one, size, device) for one in (frozen, tuned))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, PROBES, size, generator=generator).to(device)
    expected, found = inputs @ after[0].mT + after[1], tuned(inputs).float()
    if not (found - expected).norm() <= LINEAR * expected.norm():
        change = (found - frozen(inputs).float()).norm() / (inputs @ before[0].mT).norm()
        return LayerChange(None, None, {"weight": change.item()})
    delta = after[0] - before[0]
    if delta.norm() <= ROUNDING * before[0].norm():
        delta = torch.zeros_like(delta)
    moved = not (after[1] - before[1]).norm() <= ROUNDING * before[1].norm()  # also where it is NaN
    return LayerChange(before[0], delta, {"bias": relative_change(before[1], after[1], before[1])} if moved else {})


def _plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.float(), requires_grad=False)
    return layer


def is_quantised(module: BaseTunerLayer) -> bool:
    """Whether the weight of a linear layer is kept as codes."""
    return is_linear(module) and not module.get_base_layer().weight.is_floating_point()


def _affine(layer: nn.Module, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Matrix and constant of a layer, from its outputs for the unit vectors and for zero."""
    constant = layer(torch.zeros(1, 1, size, device=device))[0, 0].float()
    return (layer(torch.eye(size, device=device)[None])[0].float() - constant).mT, constant


def _merged_change(layer: BaseTunerLayer) -> dict[str, float]:
    """Change of the tensors of a layer by merging, which is done in place."""
    before = {name: tensor.clone() for name, tensor in layer.get_base_layer().named_parameters()}
    layer.merge()
    after = dict(layer.get_base_layer().named_parameters())
    changes = {name: relative_change(tensor, after[name], tensor) for name, tensor in before.items()}
    return {name: change for name, change in changes.items() if change != 0}
