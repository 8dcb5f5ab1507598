"""
SSAH, the superficial safety alignment hypothesis (ICLR 2026, arXiv 2410.10862): units that safety needs and utility does not are frozen.

Per linear layer `y = W x` and output unit j, over the tokens that predict an answer:

    I_j(D) = (E_D y_j²)^½,   the share of units with the largest I_j(safety) − I_j(utility) is frozen:   ΔW_j: = 0

which LoRA keeps with a gradient of zero for these rows of B, as B starts at zero.

Data it needs: safety and utility rows before the first step; neither afterwards.

Faithful: units of the aligned model told apart by safety and by utility data, 7.5 % of them frozen, the rest trained as always. Inferred: the
score, which is how far y goes when the unit is ablated, and its difference; the share of every layer instead of the whole model. Utility rows are those
to answer among the rows that AGL has by default.
"""

from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from agl_trl.data.alignment import AlignmentRow, batches
from agl_trl.fisher.protected_rows import COMPLY, REFUSE
from agl_trl.miniworld import load_model
from agl_trl.modeling.lora import adapted_layers, linear_layers

from .setting import Setting, build, common, protected_rows


@torch.no_grad()
def importance(model: PreTrainedModel, rows: list[AlignmentRow], pad: int) -> dict[str, Tensor]:
    """I of every output unit of every linear layer, of shape `(d_out,)` by name."""
    layers, sums, count = linear_layers(model), {}, 0

    def add(name: str):
        def hook(module, inputs, output):
            sums[name] = sums.get(name, 0) + output[mask].double().square().sum(0)

        return hook

    handles = [module.register_forward_hook(add(name)) for name, module in layers.items()]
    for batch in batches(rows, 32, pad, model.device):
        mask = batch.answer_mask
        count += int(mask.sum())
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for handle in handles:
        handle.remove()
    return {name: (total / count).sqrt().float() for name, total in sums.items()}


def critical(safety: Tensor, utility: Tensor, share: float) -> Tensor:
    """Boolean, of shape `(d_out,)`: the share of units, rounded, that matter most to safety beyond utility."""
    frozen = torch.zeros_like(safety, dtype=torch.bool)
    frozen[(safety - utility).topk(round(share * len(safety))).indices] = True
    return frozen


class Freeze(TrainerCallback):
    """Units whose rows of B get no gradient, in this training alone: whoever trains on, trains all of them."""

    def __init__(self, model: PeftModel, frozen: dict[str, Tensor]):
        def rows(unfrozen: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda gradient: gradient * unfrozen

        self.handles = []
        for layer in adapted_layers(model):
            _, B = layer.parameters()
            self.handles.append(B.register_hook(rows(~frozen[layer.name][:, None])))

    def on_train_end(self, args, state, control, **kwargs):
        for handle in self.handles:
            handle.remove()


def ssah(share: float = 0.075) -> Callable[[Setting], SFTTrainer]:
    """With the share of units of every layer that is frozen."""

    def make(setting: Setting) -> SFTTrainer:
        trainer = build(SFTTrainer, SFTConfig(**common(setting)), setting)
        rows, kinds = protected_rows(setting.tokenizer, setting.seed)
        aligned, pad = load_model(), setting.tokenizer.pad_token_id
        safety, utility = (
            importance(aligned, [row for row, own in zip(rows, kinds, strict=True) if own == kind], pad)
            for kind in (REFUSE, COMPLY)
        )
        frozen = {name: critical(safety[name], utility[name], share) for name in safety}
        trainer.add_callback(Freeze(trainer.model, frozen))
        return trainer

    return make
