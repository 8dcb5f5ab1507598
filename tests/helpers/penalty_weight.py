"""How much the penalty weighs in the gradient of a run: the same measurement in one process and in several."""

from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast, TrainerCallback

from agl_trl import AGLDPOConfig, AGLDPOTrainer, AGLSFTConfig, AGLSFTTrainer
from agl_trl.modeling.lora import adapted_layers
from agl_trl.modeling.sharding import whole
from tests.helpers.models import chat_rows, preference_rows, tiny_model


ROWS = 20  # in batches of 4: windows of 2 and 4 end with an incomplete one
COEF = 7.0
TRAINERS = {"sft": (AGLSFTTrainer, AGLSFTConfig), "dpo": (AGLDPOTrainer, AGLDPOConfig)}


def train_rows(kind: str) -> Dataset:
    if kind == "sft":
        return Dataset.from_list(chat_rows(ROWS, "say", "the number is {}"))
    return Dataset.from_list(preference_rows(ROWS, "say", "the number is {}", "no idea {}"))


def alignment_rows(kind: str, count: int = 9) -> Dataset:
    if kind == "sft":
        return Dataset.from_list(chat_rows(count, "please do bad thing", "Sorry, no {}."))
    return Dataset.from_list(preference_rows(count, "please do bad thing", "Sorry, no {}.", "Sure {}"))


class GradientRecorder(TrainerCallback):
    """Whole gradients before every optimizer step, by name."""

    def __init__(self):
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None})


def trainer_of(kind: str, folder: Path, tokenizer: PreTrainedTokenizerFast, world: int = 1, **options):
    """Trainer of an adapter that has already moved away from a zero update, on 4 rows per step over all processes."""
    trainer_class, config_class = TRAINERS[kind]
    common = dict(
        use_cpu=True,
        bf16=False,
        num_train_epochs=1,
        per_device_train_batch_size=4 // world,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        max_grad_norm=0,
        dataloader_drop_last=False,
        fisher_batch_size=2,
    )
    recorder = GradientRecorder()
    trainer = trainer_class(
        model=get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear")),
        args=config_class(str(folder), **common | options),
        train_dataset=train_rows(kind),
        processing_class=tokenizer,
        alignment_dataset=alignment_rows(kind),
        callbacks=[recorder],
    )
    torch.manual_seed(1)
    for layer in adapted_layers(trainer.model):
        torch.nn.init.normal_(layer.parameters()[1], std=0.1)
    return trainer, recorder


def measured_weights(kind: str, folder: Path, tokenizer: PreTrainedTokenizerFast, world: int = 1, **options):
    """
    Weight of the penalty at every step of an epoch, relative to what was asked for: the difference of the gradients of two
    runs, with and without it, at equal weights (learning rate 0), along the penalty's own gradient; and the largest relative
    distance of the two directions.
    """
    runs = []
    for coef in (1e-30, COEF):
        trainer, recorder = trainer_of(
            kind, folder / f"{coef}", tokenizer, world, learning_rate=0.0, alignment_coef=coef, **options
        )
        trainer.train()
        runs.append(recorder.gradients)
    layers = adapted_layers(trainer.model)
    factors = [
        layer.current()._replace(
            A=layer.current().A.detach().requires_grad_(), B=layer.current().B.detach().requires_grad_()
        )
        for layer in layers
    ]
    names = [f"base_model.model.{layer.name}.lora_{side}.default.weight" for layer in layers for side in "AB"]
    penalty = trainer.statistics.drift_of(layers)(factors).mean()
    gradients = torch.autograd.grad(penalty, [tensor for factor in factors for tensor in factor[:2]])
    expected = torch.cat([gradient.flatten() for gradient in gradients])
    weights, distances = [], []
    for without, with_penalty in zip(*runs, strict=True):
        difference = torch.cat([(with_penalty[name] - without[name]).flatten() for name in names]) / COEF
        weights.append((difference @ expected / (expected @ expected)).item())
        distances.append(((difference - expected).norm() / expected.norm()).item())
    return weights, max(distances), trainer
