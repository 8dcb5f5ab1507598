"""What is the same for all methods of a comparison."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from agl_trl import AGLDPOConfig, AGLDPOTrainer, AGLSFTConfig, AGLSFTTrainer, estimate_fisher
from agl_trl.data.alignment import AlignmentBatch, AlignmentRow, select_rows, tokenize_rows
from agl_trl.experiments.demo import LORA, TRAINING
from agl_trl.fisher.calibration import calibrate
from agl_trl.fisher.protected_rows import COMPLY, REFUSE
from agl_trl.fisher.reference_answers import ReferenceAnswers
from agl_trl.miniworld import alignment_dataset, load_model, load_tokenizer
from agl_trl.modeling.generation import answered_by
from agl_trl.modeling.lora import adapted_layers


# Pairs of a right and a useless answer; with the likelihood of the right one in the loss, as is usual, or nothing is learned.
DPO = dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0], per_device_train_batch_size=8)
PUBLISHED = "published"


@dataclass
class Setting:
    """One run: where it writes, and what is the same for all methods."""

    folder: Path
    seed: int
    steps: int
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    preferences: bool = False
    in_order: bool = False

    @property
    def plain(self) -> tuple[type, type]:
        """TRL's trainer and its config."""
        return (DPOTrainer, DPOConfig) if self.preferences else (SFTTrainer, SFTConfig)

    @property
    def agl(self) -> tuple[type, type]:
        """Ours."""
        return (AGLDPOTrainer, AGLDPOConfig) if self.preferences else (AGLSFTTrainer, AGLSFTConfig)


def common(setting: Setting, **changes: Any) -> dict[str, Any]:
    where = dict(output_dir=str(setting.folder), seed=setting.seed, max_steps=setting.steps)
    order = dict(train_sampling_strategy="sequential") if setting.in_order else {}
    return {**TRAINING, **(DPO if setting.preferences else {}), **order, **where, **changes}


def build(trainer_class: type, args: SFTConfig, setting: Setting, **kwargs: Any) -> SFTTrainer:
    trainer = trainer_class(
        args=args,
        processing_class=setting.tokenizer,
        **dict(model=load_model(), peft_config=LoraConfig(**LORA), train_dataset=setting.train) | kwargs,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def batch_nll(model: PreTrainedModel | PeftModel, batch: AlignmentBatch) -> Tensor:
    """Mean NLL per answer token, to be differentiated."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    mask = batch.answer_mask[:, :-1]
    log_probs = logits[:, :-1].float().log_softmax(-1).gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
    return -(log_probs * mask).sum() / mask.sum()


@torch.no_grad()
def adapted(model: PreTrainedModel, updates: dict[str, tuple[Tensor, Tensor]]) -> PeftModel:
    """
    A model with given updates `ΔW = B A` of its linear layers as an adapter: what a method that trains on another base comes
    to on the aligned one, so that its drift is measured like that of all others.

    Args:
        model (`PreTrainedModel`):
            The aligned model.
        updates (`dict[str, tuple[Tensor, Tensor]]`):
            A of shape `(R, d_in)` and B of shape `(d_out, R)` of every linear layer by name, R the same for all.
    """
    (rank,) = {len(A) for A, _ in updates.values()}
    model = get_peft_model(model, LoraConfig(**LORA | dict(r=rank, lora_alpha=rank)))  # scaling 1
    for layer in adapted_layers(model):
        for parameter, value in zip(layer.parameters(), updates[layer.name], strict=True):
            parameter.copy_(value)
    return model.eval()


def published_statistics(folder: Path) -> Path:
    """What the model's owner has published: in a comparison the same for all runs and put there before, else estimated here."""
    path = folder / PUBLISHED
    if not path.exists():
        model, tokenizer = load_model(), load_tokenizer()
        statistics = estimate_fisher(model, alignment_dataset(), tokenizer, progress=False)
        calibrate(model, statistics, reference_answers(model, tokenizer, 0), progress=False)
        statistics.save_pretrained(path)
    return path


def protected_rows(
    tokenizer: PreTrainedTokenizerBase, seed: int, *, answered: PreTrainedModel | None = None
) -> tuple[list[AlignmentRow], list[str]]:
    """
    The rows that AGL protects by default, tokenized, with their kinds: as many to refuse as to answer. Their answers are the given
    ones, or those of a model.
    """
    rows: list[AlignmentRow] = []
    kinds: list[str] = []
    for kind, unsafe in ((REFUSE, True), (COMPLY, False)):
        selected = select_rows(alignment_dataset(), 64, seed, unsafe=unsafe)
        if answered is not None:
            asked = [{"prompt": row["prompt"]} for row in selected]
            selected = answered_by(answered, tokenizer, asked, progress=False)
        rows += tokenize_rows(selected, tokenizer)
        kinds += [kind] * len(selected)
    return rows, kinds


def reference_answers(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> ReferenceAnswers:
    """What the aligned model says on these rows."""
    rows, kinds = protected_rows(tokenizer, seed)
    with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        return ReferenceAnswers.measure(model, tokenizer, rows, kinds, progress=False)
