"""
SaLoRA, safety-alignment preserved LoRA (Li et al., ICLR 2025, arXiv:2501.01765): a fixed module keeps updates out of the outputs that
safety data uses, and the adapter starts in the outputs that the task uses. Per layer, on tokens of the answers, with `Y = X Wᵀ`:

    V_s, V_t = the first r_s, d_s right singular vectors of Y on safety and on task rows,   C = I − V_s V_sᵀ
    W ≈ U S Qᵀ of rank r,   B₀ = V_t V_tᵀ U S^½,   A₀ = S^½ Qᵀ,   W_res = W − C B₀ A₀,   y = W_res x + C B A x

Data it needs: safety rows and task rows before the first step; neither afterwards.

Faithful: all of the above, 128 rows of each, r_s = d_s = 32, scale 1. Inferred: singular vectors and those of W are exact (eigenvectors of YᵀY) where the source draws random sketches;
r, learning rate and layers are the benchmark's; the result is written as the adapter `ΔW = C(B A − B₀ A₀)` of rank 2r on the untouched aligned model.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from agl_trl.data.alignment import batches, select_rows, tokenize_row
from agl_trl.experiments.demo import LORA
from agl_trl.miniworld import alignment_dataset, load_model
from agl_trl.modeling.lora import adapted_layers, linear_layers

from .setting import Setting, adapted, build, common


class ProjectedOut(nn.Module):
    """`C B = B − V_s (V_sᵀ B)` in place of B, shape `(d_out, r)`: C is never made, its gradient reaches B through it."""

    def __init__(self, V: Tensor):
        super().__init__()
        self.register_buffer("V", V)

    def forward(self, B: Tensor) -> Tensor:
        return B - self.V @ (self.V.mT @ B)


@torch.no_grad()
def output_directions(
    model: PreTrainedModel, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, rank: int
) -> dict[str, Tensor]:
    """First right singular vectors of the outputs of every linear layer, `(d_out, rank)`, over tokens of the answers alone."""
    layers, sums = linear_layers(model), {}

    def add(name: str):
        def hook(module, inputs, output):
            Y = output[answers].double()
            sums[name] = sums.get(name, 0) + Y.mT @ Y

        return hook

    handles = [module.register_forward_hook(add(name)) for name, module in layers.items()]
    for batch in batches([tokenize_row(row, tokenizer) for row in rows], 32, tokenizer.pad_token_id, model.device):
        # `answer_mask` marks the positions that predict an answer's token; the token itself is one further.
        answers = batch.answer_mask.roll(1, dims=1)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for handle in handles:
        handle.remove()
    return {name: torch.linalg.eigh(gram).eigenvectors[:, -rank:].float() for name, gram in sums.items()}


class SaloraTrainer(SFTTrainer):
    """`start` holds `(A₀, C B₀)` of every layer."""

    start: dict[str, tuple[Tensor, Tensor]]

    @torch.no_grad()
    def prepare(self, safety: dict[str, Tensor], task: dict[str, Tensor]) -> None:
        self.start = {}
        for layer in adapted_layers(self.model):
            (A, B), W = layer.parameters(), layer.module.get_base_layer().weight
            U, S, Qt = torch.linalg.svd(W, full_matrices=False)
            r, V = len(A), task[layer.name]
            A.copy_(S[:r].sqrt()[:, None] * Qt[:r])
            B.copy_(V @ (V.mT @ (U[:, :r] * S[:r].sqrt())))
            parametrize.register_parametrization(
                layer.module.lora_B[layer.adapter], "weight", ProjectedOut(safety[layer.name])
            )
            A, CB = (parameter.detach().clone() for parameter in layer.parameters())
            W.sub_(CB @ A)
            self.start[layer.name] = A, CB

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        self.model = self.on_aligned()
        return result

    @torch.no_grad()
    def on_aligned(self):
        updates = {}
        for layer in adapted_layers(self.model):
            (A, CB), (A0, CB0) = layer.parameters(), self.start[layer.name]
            updates[layer.name] = torch.cat([A, A0]), torch.cat([CB, -CB0], 1)
        return adapted(load_model(), updates)


def salora(safety_rank: int = 32, task_rank: int = 32, num_samples: int = 128) -> Callable[[Setting], SFTTrainer]:
    """With r_s, d_s and the number of rows of either kind."""

    def make(setting: Setting) -> SFTTrainer:
        aligned, tokenizer = load_model(), setting.tokenizer
        safety_rows = select_rows(alignment_dataset(), num_samples, setting.seed)
        task_rows = select_rows(setting.train, num_samples, setting.seed)
        peft_config = LoraConfig(**LORA | dict(lora_alpha=LORA["r"]))  # scale 1
        trainer = build(SaloraTrainer, SFTConfig(**common(setting)), setting, peft_config=peft_config)
        safety = output_directions(aligned, safety_rows, tokenizer, safety_rank)
        trainer.prepare(safety, output_directions(aligned, task_rows, tokenizer, task_rank))
        return trainer

    return make
