"""
Steering at inference: hidden states are moved while the model answers, by hooks that leave all weights as they are, so that it
stacks on any adapter. Directions are taken from the tuned model's states on the protected rows.

- `scans` (SCANS, arXiv 2408.11491): `h ← h ± α v` in the middle layers, `v = mean(h | unsafe) − mean(h | safe)`; + where the
  prompt's states lie on the unsafe side, − otherwise.
- `alphasteer` (AlphaSteer, arXiv 2506.07022): `h ← h + α h D` with `D = P D̃`, `D̃ = (XᵀX + λ PᵀP)⁺ XᵀR`, `X = H_unsafe P`, P the
  projector onto the half of the eigenvectors of `H_safeᵀ H_safe` with the smallest eigenvalues, and v in every row of R.

Faithful: both formulas, SCANS' extra forward pass for every prompt, AlphaSteer's null space and ridge regression. Inferred: SCANS
classifies by the step of the states to an appended word, here by the prompt's last states (sum of cosines over the steered layers,
seen from midway), and has v of length 3.5, here as long as the difference; both steer from the end of the prompt on, with α = 1.
AlphaSteer's λ, which is 10 for large models, is a tenth of the mean eigenvalue of `XᵀX` in the null space. Its safe states are
those of look-alikes and of as many training rows, of all their answers' tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from agl_trl.data.alignment import tokenize_rows
from agl_trl.fisher.protected_rows import COMPLY

from .representations import answer_states, protected_states, similarity
from .setting import Setting, protected_rows


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


def scans_shift(unsafe: Tensor, safe: Tensor, layers: range, strength: float = 1.0) -> Shift:
    """Towards refusal for prompts on the unsafe side, away from it for others; states of shape `(layers, rows, d)`."""

    def shift(layer: int, output: Tensor, prompt: Tensor) -> Tensor:
        score = torch.stack([similarity(prompt[i], unsafe[i], safe[i]) for i in layers]).sum(0)
        return strength * score.sign()[:, None, None] * (unsafe[layer].mean(0) - safe[layer].mean(0))

    return shift


def null_space_map(
    unsafe: Tensor, safe: Tensor, direction: Tensor, *, ratio: float = 0.5, ridge: float = 0.1
) -> Tensor:
    """D of shape `(d, d)`, from states `(rows, d)`, in a basis of the null space, where `PᵀP` is the identity."""
    _, vectors = torch.linalg.eigh(safe.mT @ safe)  # ascending
    Q = vectors[:, : round(ratio * len(vectors))]
    Z = unsafe @ Q
    gram = Z.mT @ Z
    penalty = ridge * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
    return Q @ torch.linalg.solve(gram + penalty, Z.mT @ direction.expand(len(Z), -1))


def scans(model: PeftModel, setting: Setting):
    """The context in which a model answers under SCANS."""
    unsafe, safe = protected_states(model, setting.tokenizer, setting.seed)
    return steering(model, answer_opening(setting.tokenizer), scans_shift(unsafe, safe, steered_layers(model)))


def alphasteer(model: PeftModel, setting: Setting):
    """The context in which a model answers under AlphaSteer."""
    tokenizer = setting.tokenizer
    unsafe, safe = protected_states(model, tokenizer, setting.seed)
    rows, kinds = protected_rows(tokenizer, setting.seed)
    benign = [row for row, kind in zip(rows, kinds, strict=True) if kind == COMPLY]
    benign += tokenize_rows(setting.train.select(range(min(len(benign), len(setting.train)))), tokenizer)
    states = answer_states(model, tokenizer, benign)
    maps = {
        i: null_space_map(unsafe[i], states[i], unsafe[i].mean(0) - safe[i].mean(0)) for i in steered_layers(model)
    }
    return steering(model, answer_opening(tokenizer), lambda layer, output, _: output @ maps[layer])
