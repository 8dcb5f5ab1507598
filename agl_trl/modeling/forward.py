"""Forward passes of any model: in eval mode, where its inputs go, and with no logits but those that are read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from ..data.alignment import AlignmentBatch
from .lora import packs_in_eval_mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """
    Eval mode (no dropout, and no checkpointing, which would fire some hooks twice), then every module as it was.

    At the first inference on some CPUs bitsandbytes packs 4-bit weights into a form that passes no gradient on: a training
    that goes on afterwards would silently lose most of its gradient. Not here.
    """
    modes = [(module, module.training) for module in model.modules()]
    packing: list[Any] = [module for module in model.modules() if packs_in_eval_mode(module)]
    model.eval()
    for module in packing:
        module.support_avx512bf16_for_cpu = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module in packing:
            module.support_avx512bf16_for_cpu = True


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """
    Gradient checkpointing of forward passes in eval mode, for which transformers has none: where it is on, layers keep their inputs
    alone, and run again, in eval mode too, when a gradient is taken. Without re-entry, so that `torch.autograd.grad` can take it.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    held = [vars(layer).get("forward") for layer in layers]  # of a layer whose inputs accelerate moves
    for layer in layers:
        again = partial(_in_eval_mode, layer, layer.forward)
        layer.forward = partial(checkpoint, again, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, held, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _in_eval_mode(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward pass, which comes again in a backward pass when the model is in training mode."""
    with evaluating(layer):
        return forward(*args, **kwargs)


def input_device(model: nn.Module) -> torch.device:
    """Where the inputs of a model go; one whose weights are offloaded (and here are empty) moves them itself."""
    device = next(model.parameters()).device
    return PartialState().device if device.type == "meta" else device


def context_length(model: PreTrainedModel | PeftModel) -> int | None:
    """Most tokens that a model reads at once; none where its configuration knows no bound."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def answer_logits(model: PreTrainedModel | PeftModel, batch: AlignmentBatch) -> tuple[Tensor, Tensor]:
    """
    Logits of the columns in which any row of a batch has answer tokens, of shape `(batch, columns, vocabulary)`, and which of
    them are that row's, boolean, of shape `(batch, columns)`. With large vocabularies those of all columns are gigabytes.
    """
    columns = batch.answer_mask.any(0).nonzero().squeeze(1)
    return forward_at(model, batch, columns).logits, batch.answer_mask[:, columns]


def forward_at(
    model: PreTrainedModel | PeftModel, batch: AlignmentBatch, columns: Tensor, **options: Any
) -> ModelOutput:
    """
    Output of a model for a batch, whose `logits` are those of some columns alone, of shape `(batch, columns, vocabulary)`.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Model; the batch goes to where its inputs go.
        batch ([`AlignmentBatch`]):
            Rows.
        columns (`Tensor`):
            Positions, of shape `(columns,)`.
        options:
            Further arguments of the forward pass, such as `output_hidden_states=True`.
    """
    device = input_device(model)
    # Counted from the end: prompt tuning puts its own tokens before those of the batch, and has states and logits of them.
    length = batch.input_ids.shape[1]
    columns = columns - length
    fewer: dict[str, int | Tensor] = {}
    if takes_logits_to_keep(model):
        # Of a model on several devices the last states lie where its head is, and an index has to lie there too: a number need not.
        spread = len({parameter.device for parameter in model.parameters()}) > 1
        fewer["logits_to_keep"] = -int(columns[0]) if spread else columns.to(device)
    inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}
    output = model(**inputs, use_cache=False, **fewer, **options)
    if not isinstance(fewer.get("logits_to_keep"), Tensor):
        output.logits = output.logits[:, columns.to(output.logits.device)]
    if output.hidden_states is not None:
        output.hidden_states = tuple(states[:, -length:] for states in output.hidden_states)
    return output


def takes_logits_to_keep(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the model can be asked for the logits of a few columns."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in signature(base.forward).parameters


def last_logits(model: PreTrainedModel | PeftModel) -> dict[str, int | Tensor]:
    """
    Argument of a forward pass that asks for the logits of the last token alone, empty for a model that makes all. On a CPU not the
    number 1, for which transformers makes a view of the states: torch multiplies a view by a frozen head as a batch there, with a
    copy of the head for every row. Those of 32 rows are 9 GB with a vocabulary of 150,000 in bfloat16. Elsewhere the number: a
    model that is spread over several devices has its last states on another device than its inputs, where an index of these is not
    read.
    """
    if not takes_logits_to_keep(model):
        return {}
    return {"logits_to_keep": torch.tensor([-1]) if input_device(model).type == "cpu" else 1}
