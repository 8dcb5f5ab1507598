"""What the callback adds before the optimizer's step is what the penalty in the loss would have added, on the embedded model."""

import pytest
import torch
from peft import LoraConfig
from trl import DPOConfig, SFTConfig

from agl_trl import AGLDPOConfig, AGLDPOTrainer, AGLSFTConfig, AGLSFTTrainer
from agl_trl.miniworld import alignment_dataset, load_model, load_tokenizer, preference_dataset, task_dataset
from agl_trl.modeling.lora import adapted_layers
from tests.helpers.loss_side import LossSideDPOTrainer, LossSideSFTTrainer


STEPS = 20
COMMON = dict(
    use_cpu=True,
    bf16=False,
    max_steps=STEPS,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    max_grad_norm=0,  # what clipping changes is in docs/method.md
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
    gradient_checkpointing=False,
    logging_steps=STEPS,
)
KINDS = {
    "sft": (AGLSFTTrainer, AGLSFTConfig, LossSideSFTTrainer, SFTConfig, task_dataset),
    "dpo": (AGLDPOTrainer, AGLDPOConfig, LossSideDPOTrainer, DPOConfig, preference_dataset),
}
OPTIONS = {
    "penalty": dict(alignment_coef=3.0),
    "budget": dict(drift_budget=2e-4),  # reached within a few steps
    "anchor": dict(alignment_coef=0.3, anchor_coef=0.5, anchor_every=3),
    "two weights": dict(alignment_coef=3.0, task_coef=1.0),
}
CASES = [("sft", name, 1) for name in OPTIONS] + [("sft", "budget", 3), ("dpo", "penalty", 2), ("dpo", "budget", 1)]


def adapter(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for layer in adapted_layers(trainer.model) for p in layer.parameters()])


@pytest.mark.parametrize(("kind", "name", "accumulation"), CASES)
def test_weights_after_twenty_steps_are_the_same(kind, name, accumulation, tmp_path):
    ours, our_config, former, config, dataset = KINDS[kind]
    shared = COMMON | dict(gradient_accumulation_steps=accumulation)
    data = dict(train_dataset=dataset("extract").select(range(160)), processing_class=load_tokenizer())
    lora = dict(peft_config=LoraConfig(r=4, target_modules="all-linear"))
    rows = alignment_dataset().select(range(16))
    trainer = ours(
        load_model(),
        args=our_config(str(tmp_path), **shared, **OPTIONS[name]),
        alignment_dataset=rows,
        **data,
        **lora,
    )
    trainer.train()
    twin = former(load_model(), args=config(str(tmp_path / "twin"), **shared), **data, **lora)
    twin.regularize(adapted_layers(twin.model), trainer.statistics, **OPTIONS[name])
    protection = trainer.align_guard.protection
    twin.anchor = None if protection is None else protection.anchor
    start = adapter(twin)
    twin.train()
    difference, moved = (adapter(trainer) - adapter(twin)).abs().max(), (adapter(twin) - start).abs().max()
    assert difference <= 1e-5 and moved > 1e-3
    if "drift_budget" in OPTIONS[name]:
        assert trainer.align_guard.regularizer.budget.multiplier > 0, "it was reached"
