"""
Steering at inference: hidden states are moved while the model answers, by hooks that leave all weights as they are, so that it
stacks on any adapter.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


Shift = Callable[[int, Tensor, Tensor], Tensor]


def steered_layers(model: PeftModel) -> range:
    """Numbers of the layers of the middle half."""
    count = model.config.num_hidden_layers
    return range(count // 4, max(3 * count // 4, 1))


def prompt_ends(input_ids: Tensor, opening: list[int]) -> Tensor:
    """Where the opening of the first answer ends in every row."""
    found = (input_ids.unfold(1, len(opening), 1) == torch.tensor(opening, device=input_ids.device)).all(-1)
    return found.int().argmax(1) + len(opening) - 1


def answer_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the chat template writes before an answer."""
    asked = [{"role": "user", "content": "Hello"}]
    closed, opened = (
        tokenizer.apply_chat_template(asked, add_generation_prompt=more, return_dict=True)["input_ids"]
        for more in (False, True)
    )
    return opened[len(closed) :]


@contextmanager
def steering(model: PeftModel, opening: list[int], shift: Shift) -> Iterator[None]:
    """
    Move the outputs of the middle layers, in every pass, from the end of the prompt on.

    Args:
        model (`PeftModel`):
            Model, left as it was at the end.
        opening (`list[int]`):
            Tokens before an answer.
        shift (`Callable`):
            Gets a layer's number, its output of shape `(batch, tokens, d)`, and the unsteered states at the end of the prompts in all
            layers, of shape `(layers, batch, d)`; returns what is added to the output.
    """
    inner = model.get_base_model()
    prompt, mask, looking = torch.empty(0), torch.empty(0), False

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal prompt, mask, looking
        ids = kwargs["input_ids"]
        if looking:
            return
        if ids.shape[1] == 1:  # one more token of the same answers
            mask = torch.ones_like(ids)
            return
        ends, rows = prompt_ends(ids, opening), torch.arange(len(ids))
        mask = torch.arange(ids.shape[1]) >= ends[:, None]
        looking = True  # the pass that SCANS makes before it answers
        given = {key: kwargs[key] for key in ("input_ids", "attention_mask", "position_ids") if key in kwargs}
        states = module(**given, use_cache=False, output_hidden_states=True).hidden_states[1:]
        prompt, looking = torch.stack(states)[:, rows, ends], False

    def move(layer: int) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            return None if looking else output + mask[..., None] * shift(layer, output, prompt)

        return hook

    hooks = [inner.register_forward_pre_hook(look, with_kwargs=True)]
    hooks += [inner.model.layers[i].register_forward_hook(move(i)) for i in steered_layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
