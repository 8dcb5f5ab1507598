"""Which layers are guarded, under which names, and their ΔW. Knows PEFT; knows nothing of statistics."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..objective.collision import FrozenWeights
from ..objective.quadratic_form import LoraFactors
from .names import named_modules
from .sharding import put, whole
from .trained_tensors import TrainedTensor, trained_tensors
from .tuned_layers import tuned_linear_layers


# Inits that leave ΔW = 0 and the base weight untouched: adapter off *is* the base model.
ZERO_DELTA_INITS = (True, "gaussian", "eva", "orthogonal")
# Quantised linear layers of PEFT, named by class because their modules import only where bitsandbytes is installed.
QUANTIZED_LORA_LAYERS = ("Linear4bit", "Linear8bitLt")


class NoFactors(ValueError):
    """An adapter is outside the maths of LoRA factors: it can be measured, but neither guarded nor projected."""


@dataclass(frozen=True)
class AdaptedLayer:
    """
    LoRA-adapted linear layer.

    Args:
        name (`str`):
            Name of the layer in the *base* model, such as `"model.layers.0.self_attn.q_proj"`.
        module (`LoraLayer`):
            PEFT's wrapper around it.
        adapter (`str`):
            Name of the adapter, such as `"default"`.
        reference (`LoraFactors`, *optional*):
            Factors at the start of training, of an adapter that had already moved; `None` where ΔW started at zero.
        beside (`tuple[TrainedTensor]`, *optional*):
            What the adapter trains beside its LoRA layers; the same for all of them.
    """

    name: str
    module: LoraLayer
    adapter: str
    reference: LoraFactors | None = None
    beside: tuple[TrainedTensor, ...] = ()

    def parameters(self) -> tuple[Tensor, Tensor]:
        """The weights of `lora_A` and `lora_B`; looked up on every call, because PEFT replaces them when it loads a checkpoint."""
        return self.module.lora_A[self.adapter].weight, self.module.lora_B[self.adapter].weight

    def current(self) -> LoraFactors:
        """The adapter's own factors; under FSDP2 gathered from all processes, which all must ask."""
        A, B = self.parameters()
        return LoraFactors(whole(A), whole(B), self.module.scaling[self.adapter])

    def factors(self) -> LoraFactors:
        """Factors of the movement since training began, `ΔW = sBA − s₀B₀A₀`: of rank 2r where there is a reference."""
        A, B, s = self.current()
        if self.reference is None:
            return LoraFactors(A, B, s)
        A0, B0, s0 = self.reference
        A, B, A0, B0 = A.float(), B.float(), A0.to(A.device, torch.float32), B0.to(B.device, torch.float32)
        # s(B − B₀)A + B₀(sA − s₀A₀): the differences are taken between factors, where nothing large cancels.
        return LoraFactors(torch.cat([A, s * A - s0 * A0]), torch.cat([s * (B - B0), B0], 1), 1.0)

    @torch.no_grad()
    def has_moved(self) -> bool:
        """Whether BA is not zero; orthogonal inits have BA = 0 up to rounding with both factors non-zero."""
        A, B, _ = self.current()
        moved = ((B.mT @ B) * (A @ A.mT)).sum() > 1e-10 * A.square().sum() * B.square().sum()
        return bool(moved)

    def with_reference(self) -> Self:
        """This layer with its current factors as reference; what is trained beside it is kept too."""
        A, B, s = self.current()
        for tensor in self.beside:
            tensor.keep_reference()
        return replace(self, reference=LoraFactors(A.detach().clone(), B.detach().clone(), s))


def active_adapter(model: PeftModel) -> str:
    """
    Name of the one active adapter.

    Raises:
        `ValueError`: If several adapters are active at once.
    """
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"AGL guards one active adapter, but {len(active)} are active: {', '.join(active)}.")
    return active[0]


def adapted_layers(model: PreTrainedModel | PeftModel) -> list[AdaptedLayer]:
    """
    LoRA layers of the active adapter, in the order of the model; empty for a model without an adapter. LoRA on embeddings is
    no layer, but trained beside them.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Model to look at.

    Raises:
        [`NoFactors`]: If the adapter is outside the maths: another method than LoRA, DoRA and other variants, convolutions,
            `target_parameters`, a LoRA bias, or an init that changes the base weight.
    """
    if not isinstance(model, PeftModel):
        return []
    adapter = active_adapter(model)
    config = model.peft_config[adapter]
    if config.peft_type != "LORA":
        raise NoFactors(f"AGL guards LoRA adapters, but adapter '{adapter}' is of type {config.peft_type.value}.")
    if config.init_lora_weights not in ZERO_DELTA_INITS:
        raise NoFactors(
            f"`init_lora_weights={config.init_lora_weights!r}` starts from another ΔW than zero or changes the base "
            "weight, so that 'adapter off' is not the aligned model: use the default init."
        )
    if config.bias != "none":
        raise NoFactors(
            f"`LoraConfig(bias={config.bias!r})` trains biases of the base model, so that 'adapter off' is not the aligned model: "
            "use `bias='none'`."
        )
    layers, beside = [], trained_tensors(model, adapter)
    for name, module in named_modules(model.get_base_model()):
        if isinstance(module, LoraLayer) and adapter in _adapters(module):
            _check_supported(name, module, adapter)
            if isinstance(module, LoraEmbedding):
                continue  # in `beside`
            layers.append(AdaptedLayer(name, module, adapter, beside=beside))
    return layers


def _adapters(module: LoraLayer) -> set[str]:
    return {*module.lora_A, *module.lora_embedding_A}


def _check_supported(name: str, module: LoraLayer, adapter: str) -> None:
    if adapter in module.lora_variant:
        variant = type(module.lora_variant[adapter]).__name__.removesuffix("LinearVariant")
        raise NoFactors(f"Layer '{name}' uses the LoRA variant {variant}, which AGL has no quadratic form for.")
    if type(module).__name__ == "ParamWrapper":
        raise NoFactors(
            f"Layer '{name}' holds its weights as bare parameters (a router, or experts in one tensor), but AGL guards linear "
            "layers only. PEFT adapts such layers too where `target_modules` is 'all-linear' or names them: name the attention "
            "projections, such as `target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj']`, and no `target_parameters`."
        )
    if not (isinstance(module, LoraLinear | LoraEmbedding) or type(module).__name__ in QUANTIZED_LORA_LAYERS):
        raise NoFactors(
            f"Layer '{name}' is adapted by {type(module).__name__}, but AGL guards linear layers only: leave convolutions out of "
            "the adapter."
        )
    if module.lora_bias[adapter]:
        raise NoFactors(
            f"Layer '{name}' trains a LoRA bias, which the quadratic form does not cover: set `lora_bias=False`."
        )


def with_factors(model: PeftModel) -> list[AdaptedLayer] | None:
    """[`adapted_layers`], or `None` where the adapter is outside their maths."""
    try:
        return adapted_layers(model)
    except NoFactors:
        return None


@contextmanager
def at_reference(model: PeftModel, layers: list[AdaptedLayer]) -> Iterator[None]:
    """
    The model as it was when training began: adapter off, or its reference factors and what it trains beside them put back for
    a while.
    """
    if not layers or layers[0].reference is None:
        with model.disable_adapter():
            yield
        return
    starts: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        assert layer.reference is not None, "every layer of a continued adapter has a reference"
        starts += zip(layer.parameters(), layer.reference[:2], strict=True)
    starts += [(tensor.parameter(), tensor.reference) for tensor in layers[0].beside if tensor.reference is not None]
    kept = [whole(parameter).detach().clone() for parameter, _ in starts]
    try:
        for parameter, value in starts:
            put(parameter, value)
        yield
    finally:
        for (parameter, _), value in zip(starts, kept, strict=True):
            put(parameter, value)


def trained_outside_lora(model: PeftModel) -> list[str]:
    """
    Names of parameters that belong to no guarded layer and are trainable, or trained by the active adapter: those of
    `modules_to_save` and `trainable_token_indices`.
    """
    layers = adapted_layers(model)
    guarded = {id(p) for layer in layers for p in layer.parameters()}
    beside = {id(tensor.parameter()) for tensor in trained_tensors(model, active_adapter(model))}
    return [n for n, p in model.named_parameters() if (p.requires_grad or id(p) in beside) and id(p) not in guarded]


def linear_layers(model: PreTrainedModel | PeftModel, *, head: bool = False) -> dict[str, nn.Module]:
    """
    Linear layers by base name: those that its adapter changes of a model with one, whatever its method; of a plain model all but
    the output embeddings (those that `target_modules="all-linear"` would adapt), or these too (`head`).
    """
    if isinstance(model, PeftModel):
        layers = with_factors(model)
        if layers is None:
            return tuned_linear_layers(model, active_adapter(model))
        return {layer.name: layer.module for layer in layers}
    left_out = None if head else model.get_output_embeddings()
    return {
        name: module
        for name, module in named_modules(model)
        if isinstance(module, nn.Linear | Conv1D) and module is not left_out
    }


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """`(d_out, d_in)` of a linear layer or of PEFT's wrapper around one."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    if isinstance(module, BaseTunerLayer):
        return layer_shape(module.get_base_layer())
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def packs_in_eval_mode(module: nn.Module) -> bool:
    """
    Whether a layer is one of bitsandbytes' 4-bit layers that, on a CPU with AVX512-BF16, rearranges its weight for good
    at the first forward pass in eval mode: it then has no gradient for its input, without a word.
    """
    return type(module).__name__ == "Linear4bit" and getattr(module, "support_avx512bf16_for_cpu", False)


def _unpacked(weight: Any) -> Tensor:
    """A 4-bit weight that was rearranged so, dequantised; PEFT would read it in the wrong order."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit

    state = copy(weight.quant_state)
    scales = state.absmax.mT.float().reshape(-1)  # which the inverse leaves transposed, or quantises again
    state.original_nested = False
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = scales
    return dequantize_4bit(data, state)


@torch.no_grad()
def base_weight(module: nn.Module) -> Tensor:
    """Frozen weight `W` of shape `(d_out, d_in)`, float32; a quantised one is dequantised."""
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if type(base.weight).__name__ == "Int8Params":  # which PEFT's general function breaks on a CPU, by moving it
        weight = dequantize_bnb_weight(base.weight, state=base.state).float()
    elif getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        weight = _unpacked(base.weight).float()
    else:
        weight = whole(dequantize_module_weight(base).detach()).float()  # as it is where it is not quantised
    weight = weight.mT if isinstance(base, Conv1D) else weight
    if tuple(weight.shape) != layer_shape(module):
        raise ValueError(
            f"The weight of a layer of class {type(base).__name__} can't be read: it has shape {tuple(weight.shape)} where "
            f"{layer_shape(module)} was expected; this quantisation is not supported."
        )
    return weight


def frozen_weights(layers: list[AdaptedLayer]) -> FrozenWeights:
    """
    Frozen weights of guarded layers, read by rows when the Riemannian overlap asks for them. Quantised weights are
    dequantised at every reading.
    """
    each = list(each_frozen(layers))
    rms, squared = (torch.cat([getattr(one, name) for one in each]).cpu() for name in ("rms", "squared_norm"))
    return FrozenWeights([partial(_weight_rows, layer.module) for layer in layers], rms, squared)


def each_frozen(layers: list[AdaptedLayer]) -> Iterator[FrozenWeights]:
    """Frozen weight of every layer in turn."""
    for layer in layers:
        yield one_frozen(base_weight(layer.module))


def one_frozen(weight: Tensor) -> FrozenWeights:
    """A weight of shape `(d_out, d_in)` that is at hand whole."""
    squared = weight.square()
    return FrozenWeights([weight.__getitem__], squared.mean().sqrt()[None], squared.sum()[None])


def _weight_rows(module: LoraLayer, rows: Tensor) -> Tensor:
    base: Any = module.get_base_layer()
    if isinstance(base, Conv1D):
        return base.weight.detach()[:, rows].mT.float()
    plain = base.weight.is_floating_point() and base.weight.shape == layer_shape(module)
    if plain and not isinstance(base.weight, DTensor):
        return base.weight.detach()[rows].float()
    return base_weight(module)[rows]
