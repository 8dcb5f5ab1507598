"""GRPO with the alignment kept."""

from collections.abc import Callable

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from trl import GRPOTrainer
from trl.trainer.grpo_trainer import EnvironmentFactory, RewardFunc, RolloutFunc

from .base import AlignGuardMixin
from .checks import Rows
from .trl_config import AGLGRPOConfig


class AGLGRPOTrainer(AlignGuardMixin, GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] that keeps the alignment of the model it trains, as [`AGLSFTTrainer`] does. Of an adapter that
    TRL copies as reference (`"ref"`), only the trained one is guarded and saved.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            Aligned model: id on the Hub, folder, the model itself, or one with an adapter to go on with, whose start is then what
            counts as aligned.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            Reward functions or reward models.
        args ([`AGLGRPOConfig`], *optional*):
            Training arguments; plain ones get AGL's defaults.
        train_dataset (`Dataset` or `IterableDataset`, *optional*):
            Rows to train on.
        eval_dataset (`Dataset`, `IterableDataset` or `dict`, *optional*):
            Rows to evaluate on.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer; by default the model's.
        reward_processing_classes (`PreTrainedTokenizerBase` or `list`, *optional*):
            Tokenizers of the reward models.
        callbacks (`list[TrainerCallback]`, *optional*):
            Callbacks; the one that protects the model is put before them.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler.
        quantization_config (`BitsAndBytesConfig`, *optional*):
            Quantisation of a model given by name.
        peft_config (`PeftConfig`, *optional*):
            Adapter, a `LoraConfig`; not needed of a model that has one.
        tools (`list[Callable]`, *optional*):
            Tools that the model may call.
        rollout_func (`RolloutFunc`, *optional*):
            Generates completions in place of the trainer.
        environment_factory (`EnvironmentFactory` or `dict`, *optional*):
            Makes environments for the rollouts.
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
    from trl.rewards import accuracy_reward
    from agl_trl import AGLGRPOConfig, AGLGRPOTrainer

    trainer = AGLGRPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=accuracy_reward,
        args=AGLGRPOConfig("outputs", kl_budget=0.02),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    trainer.train()
    ```
    """

    config_class = AGLGRPOConfig
    _reference_adapter = "ref"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: AGLGRPOConfig | TrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: EnvironmentFactory | dict[str, EnvironmentFactory] | None = None,
        *,
        alignment_dataset: Rows | None = None,
        protect: dict[str, Rows] | None = None,
    ):
        super().__init__(
            **self._install(model, args, peft_config, callbacks, alignment_dataset, protect),
            reward_funcs=reward_funcs,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            optimizers=optimizers,
            quantization_config=quantization_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
