"""Short runs of a tiny model, and what they leave."""

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from agl_trl import AGLSFTConfig, AGLSFTTrainer
from tests.helpers.models import tiny_model


COMMON = dict(
    use_cpu=True,
    bf16=False,
    max_steps=4,
    per_device_train_batch_size=4,
    learning_rate=1e-2,
    logging_steps=1,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
    gradient_checkpointing=False,
)


def lora(**changes) -> LoraConfig:
    return LoraConfig(**dict(r=4, target_modules="all-linear", lora_dropout=0.1) | changes)


def agl_trainer(path, tokenizer, train_rows, alignment_rows, model=None, peft_config=None, protect=None, **config):
    return AGLSFTTrainer(
        model if model is not None else tiny_model(),
        AGLSFTConfig(str(path), **COMMON | config),
        train_dataset=train_rows,
        processing_class=tokenizer,
        peft_config=peft_config or (None if isinstance(model, PeftModel) else lora()),
        alignment_dataset=alignment_rows,
        protect=protect,
    )


def telling_model(seed: int = 0) -> PreTrainedModel:
    """A tiny model that prefers some tokens: its head is not as flat as that of a fresh one."""
    model = tiny_model(seed=seed)
    model.get_output_embeddings().weight.data.mul_(20)
    return model


def adapter_of(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def logged(trainer) -> list[dict]:
    timings = ("runtime", "per_second", "flos")
    return [
        {k: v for k, v in entry.items() if not any(t in k for t in timings)} for entry in trainer.state.log_history
    ]
