"""
LAPT, layer-wise adversarial perturbation training: the model is trained to answer safety rows also where the input of a layer is
moved against it, one layer after the other.

    δ = ε · rms(h) · sign(∂ NLL / ∂h)        h the input of layer ℓ = step mod L, on the safety rows' tokens
    L = L_task + λ (NLL + NLL with h + δ) / 2

Inferred, all of it: no text was found under this name, and this is what the name says. One step of gradient sign, ε a tenth of the
root mean square of h, λ = 0.2 and one row in turn as for replay, the protected rows of AGL, refusals and look-alikes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer

from agl_trl.data.alignment import AlignmentBatch, AlignmentRow, batches

from .setting import Setting, batch_nll, build, common, protected_rows


@contextmanager
def layer_input(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """With the hidden states that go into a layer changed."""
    hook = layer.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def perturbation(model: nn.Module, layer: nn.Module, batch: AlignmentBatch, epsilon: float) -> tuple[Tensor, Tensor]:
    """NLL of a batch as it is, with its graph, and δ of a layer's input, of shape `(batch, tokens, d)`, 0 at the padding."""
    held: list[Tensor] = []

    def hold(states: Tensor) -> Tensor:
        held.append(states if states.requires_grad else states.detach().requires_grad_())
        return held[0]

    with layer_input(layer, hold):
        nll = batch_nll(model, batch)
    (h,) = held
    (gradient,) = torch.autograd.grad(nll, h, retain_graph=True)
    real = batch.attention_mask[..., None].to(h.dtype)
    rms = ((h.detach().square() * real).sum() / (real.sum() * h.shape[-1])).sqrt()
    return nll, epsilon * rms * gradient.sign() * real


class LaptTrainer(SFTTrainer):
    """`safety_rows` are taken in turn."""

    safety_rows: list[AlignmentRow]
    coef, epsilon, rows_per_step = 0.2, 0.1, 1

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            return loss
        step, rows = self.state.global_step, self.safety_rows
        chosen = [rows[(step * self.rows_per_step + i) % len(rows)] for i in range(self.rows_per_step)]
        (batch,) = batches(chosen, len(chosen), self.processing_class.pad_token_id, self.model.device)
        layers = self.model.get_base_model().model.layers
        layer = layers[step % len(layers)]
        nll, delta = perturbation(self.model, layer, batch, self.epsilon)
        with layer_input(layer, lambda states: states + delta):
            return loss + self.coef * (nll + batch_nll(self.model, batch)) / 2


def lapt(coef: float = 0.2, epsilon: float = 0.1) -> Callable[[Setting], SFTTrainer]:
    """With λ and ε."""

    def make(setting: Setting) -> SFTTrainer:
        trainer = build(LaptTrainer, SFTConfig(**common(setting)), setting)
        rows, _ = protected_rows(setting.tokenizer, setting.seed)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(setting.seed)).tolist()
        trainer.safety_rows = [rows[i] for i in order]
        trainer.coef, trainer.epsilon = coef, epsilon
        return trainer

    return make
