"""
After GuardSpace (ICLR 2026, arXiv 2510.14301): what safety rows put into a layer is kept out of its update.

Per layer, with `X = E[x xᵀ]` of its input over the tokens of unsafe rows and U the fewest leading eigenvectors of X that hold the
share e of its trace, before the first step and after every step:

    A ← A (I − U Uᵀ),   so that   ΔW U = 0

Data it needs: the safety rows before the first step, of which the input covariances are enough.

Faithful: the null-space projector from activations of harmful prompts, which guards the update. Inferred: its range is by energy, 95 %
unless said, as an exact null space is empty with more tokens than dimensions; projection of A itself, and after every step, instead of a module in the
forward pass; tokens of prompts and answers; the initialisation from the singular directions of W X is left out: LoRA starts as always.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from agl_trl import estimate_fisher
from agl_trl.miniworld import alignment_dataset, load_model
from agl_trl.modeling.lora import adapted_layers
from agl_trl.objective.covariance import LowRankCovariance

from .setting import Setting, build, common


RANK = 4096  # every eigenpair: an input is smaller here


def leading(X: LowRankCovariance, energy: float) -> Tensor:
    """U, of shape `(d_in, k)`: the fewest leading eigenvectors that hold this share of the trace, of all eigenpairs."""
    held = X.eigenvalues.double().clamp_min(0).cumsum(0)
    return X.eigenvectors[:, : int((held < energy * held[-1]).sum()) + 1]


class NullSpace(TrainerCallback):
    """Projects every A before the first step and after every one; `directions` holds U of every layer by name."""

    def __init__(self, directions: dict[str, Tensor]):
        self.directions = directions

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.project(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.project(model)

    @torch.no_grad()
    def project(self, model) -> None:
        for layer in adapted_layers(model):
            (A, _), U = layer.parameters(), self.directions[layer.name]
            A.sub_((A @ U) @ U.mT)


def guardspace(energy: float = 0.95) -> Callable[[Setting], SFTTrainer]:
    """With the share of the trace."""

    def make(setting: Setting) -> SFTTrainer:
        trainer = build(SFTTrainer, SFTConfig(**common(setting)), setting)
        options = dict(rank=RANK, dtype=torch.float32, seed=setting.seed, progress=False)
        statistics = estimate_fisher(load_model(), alignment_dataset(), setting.tokenizer, **options)
        directions = {name: leading(statistics.inputs[key], energy) for name, key in statistics.input_of.items()}
        trainer.add_callback(NullSpace(directions))
        return trainer

    return make
