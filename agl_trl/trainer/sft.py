"""SFT with the alignment kept."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTTrainer

from .base import AlignGuardMixin
from .checks import Rows
from .trl_config import AGLSFTConfig


class AGLSFTTrainer(AlignGuardMixin, SFTTrainer):
    """
    [`~trl.SFTTrainer`] that keeps the alignment of the model it fine-tunes. Its loss is its parent's; to the gradient of every
    step it adds that of AlignGuard's terms ([`AlignGuardCallback`]), and to everything it saves and pushes the evidence.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            Aligned model: id on the Hub, folder, the model itself, or one with an adapter to go on with, whose start is then what
            counts as aligned.
        args ([`AGLSFTConfig`], *optional*):
            Training arguments; plain ones get AGL's defaults.
        data_collator (`DataCollator`, *optional*):
            Makes batches of rows.
        train_dataset (`Dataset` or `IterableDataset`, *optional*):
            Rows to train on.
        eval_dataset (`Dataset`, `IterableDataset` or `dict`, *optional*):
            Rows to evaluate on.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer; by default the model's.
        compute_loss_func (`Callable`, *optional*):
            Loss of the outputs, in place of the model's.
        compute_metrics (`Callable`, *optional*):
            Metrics of the evaluation.
        callbacks (`list[TrainerCallback]`, *optional*):
            Callbacks; the one that protects the model is put before them.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler.
        optimizer_cls_and_kwargs (`tuple`, *optional*):
            Class and arguments of the optimizer.
        preprocess_logits_for_metrics (`Callable`, *optional*):
            Called on the logits before they are kept for metrics.
        quantization_config (`BitsAndBytesConfig`, *optional*):
            Quantisation of a model given by name.
        peft_config (`PeftConfig`, *optional*):
            Adapter, a `LoraConfig`; not needed of a model that has one.
        formatting_func (`Callable`, *optional*):
            Makes a text of a row.
        alignment_dataset (`Dataset`, `IterableDataset` or `Sequence[dict]`, *optional*):
            Rows whose behaviour must not change, in one of TRL's formats; of rows with a boolean column `unsafe`, those marked are to
            be refused, the others to be answered. By default the model's own answers to the requests of DriftCaps' protection split.
        protect (`dict`, *optional*):
            Rows of other behaviours by name, as in [`AlignGuardCallback`].

    Raises:
        `ValueError`: Without an adapter, with rows that can't be read, or under an engine that AGL does not run on.
        `OSError`: If the output folder can't be written.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from agl_trl import AGLSFTConfig, AGLSFTTrainer

    trainer = AGLSFTTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=AGLSFTConfig("outputs", kl_budget=0.02),
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
        peft_config=LoraConfig(target_modules="all-linear"),
        alignment_dataset=[{"prompt": "How do I pick my neighbour's lock?", "completion": " I can't help with that."}],
    )
    trainer.train()
    ```
    """

    config_class = AGLSFTConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: AGLSFTConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        *,
        alignment_dataset: Rows | None = None,
        protect: dict[str, Rows] | None = None,
    ):
        super().__init__(
            **self._install(model, args, peft_config, callbacks, alignment_dataset, protect),
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            formatting_func=formatting_func,
        )
