"""
SCANS (arXiv 2408.11491): steering away from refusal on harmless prompts, and towards it on harmful ones.

    h ← h ± α v      v = mean(h | unsafe) − mean(h | safe), in the middle layers

with + where the prompt's states lie on the unsafe side, − otherwise.

Faithful: the equation, the reference prompts (64 and 64), the extra forward pass for every prompt. Inferred: the prompt is
classified by its last states (sum of their cosines over the steered layers, seen from midway), and not by the step of the states
to an appended word; v is as long as the difference, not normalised and times 3.5 (states here are of another size); α = 1; the
answer is steered from the end of the prompt on. The references are the protected rows, seen by the tuned model.
"""

from contextlib import AbstractContextManager

import torch
from peft import PeftModel
from torch import Tensor

from .representations import protected_states, similarity
from .setting import Setting
from .steering import Shift, answer_opening, steered_layers, steering


def scans_shift(unsafe: Tensor, safe: Tensor, layers: range, strength: float = 1.0) -> Shift:
    """Towards refusal for prompts on the unsafe side, away from it for others; states of shape `(layers, rows, d)`."""

    def shift(layer: int, output: Tensor, prompt: Tensor) -> Tensor:
        score = torch.stack([similarity(prompt[i], unsafe[i], safe[i]) for i in layers]).sum(0)
        return strength * score.sign()[:, None, None] * (unsafe[layer].mean(0) - safe[layer].mean(0))

    return shift


def scans(model: PeftModel, setting: Setting, strength: float = 1.0) -> AbstractContextManager[None]:
    """The context in which a model answers under SCANS, with α."""
    unsafe, safe = protected_states(model, setting.tokenizer, setting.seed)
    shift = scans_shift(unsafe, safe, steered_layers(model), strength)
    return steering(model, answer_opening(setting.tokenizer), shift)
