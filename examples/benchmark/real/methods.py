"""
The methods by name: what each changes in an otherwise equal run. A further one is a line of `METHODS`, with the keys

- `lr`: times the given learning rate;
- `agl`: options of `AGLSFTConfig`; it gets all protected rows, or with `rows=False` the published statistics alone;
- `trainer`: another trainer, which gets the protected rows, or the model before alignment (`--before`);
- `callback`: makes one of the trainer, the protected rows and the seed.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

from agl_trl import AGLSFTConfig, AGLSFTTrainer, AlignGuardConfig
from agl_trl.data.alignment import AlignmentRow, batches, pad_token_id, tokenize_row
from agl_trl.modeling.loading import load_model

from ..baselines import EWCTrainer, ReplayTrainer
from ..lapt import LaptTrainer
from ..safe_lora import SafeLoraTrainer
from .base import Base
from .measure import BATCH, row_figures
from .peers import LONGEST, guardspace, safegrad
from .setting import Options


EWC_ROWS = 64


class KLTrainer(SFTTrainer):
    """KL to the model with its adapter off, on a few protected rows of every step: mean over rows, weight 1."""

    rows_per_step = 16
    protected_rows: list[AlignmentRow]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        rows, start = self.protected_rows, self.state.global_step * self.rows_per_step
        chosen = [rows[(start + i) % len(rows)] for i in range(self.rows_per_step)]
        # A few at a time, so that their logits are not all in memory.
        for batch in batches(chosen, BATCH, pad_token_id(self.processing_class), self.model.device):
            with self.compute_loss_context_manager():
                _, kl = row_figures(self.model, batch)
            self.accelerator.backward(kl.sum() / len(chosen))
        return loss


METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain-lr0.3": dict(lr=0.3),
    "plain-lr3": dict(lr=3.0),
    "agl": dict(agl={}),
    "agl-radius4": dict(agl=dict(trust_radius=4.0)),
    "agl-rows-16": dict(agl=dict(anchor_batch_size=16)),
    "agl-no-region": dict(agl=dict(trust_radius=None)),
    "agl-no-anchor": dict(agl=dict(kl_budget=0.02, anchor_coef=0.0)),
    "agl-terms": dict(agl=dict(task_coef=0.5, collision_coef=0.1, collision_rows=32)),  # the paper's others, on top
    "agl-statistics": dict(agl=dict(drift_budget=3e-3), rows=False),
    "paper": dict(agl=dict(variant="paper")),
    # The same, shrunk at the end until AGL's budget holds.
    "paper-kl": dict(agl=dict(variant="paper", kl_budget=0.02, anchor_coef=0.0, trust_radius=None)),
    "replay": dict(trainer=ReplayTrainer),
    "kl": dict(trainer=KLTrainer),
    "ewc": dict(trainer=EWCTrainer),
    "safe-lora": dict(trainer=SafeLoraTrainer),
    "safegrad": dict(callback=safegrad),
    "guardspace": dict(callback=guardspace),
    "lapt": dict(trainer=LaptTrainer),
}
KL_BUDGET = "agl-kl"


def chosen_methods(options: Options) -> list[str]:
    """
    Names of the methods to run.

    Raises:
        `ValueError`: If there is no such method, or its options are none of AGL's.
    """
    names = [*options.methods, *(f"{KL_BUDGET}{budget:g}" for budget in options.kl_budget)]
    for name in names:
        if name not in METHODS and not name.startswith(KL_BUDGET):
            raise ValueError(f"There is no method '{name}'; known are {', '.join(METHODS)}, and `--kl-budget`.")
        if method_options(name).get("trainer") is SafeLoraTrainer and options.before is None:
            raise ValueError(f"Method '{name}' takes the model before alignment: name it as `--before`.")
        try:
            config = AlignGuardConfig(**method_options(name).get("agl", {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"Method '{name}': {error}.") from error
        if not config.agl_enabled:
            raise ValueError(f"Method '{name}' switches everything of AGL off.")
    return list(dict.fromkeys(names))


def method_options(name: str) -> dict[str, Any]:
    """Of a name of `METHODS`, or of AGL with a KL budget."""
    return METHODS[name] if name in METHODS else dict(agl=dict(kl_budget=float(name.removeprefix(KL_BUDGET))))


def make(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    base: Base,
    options: Options,
    seed: int,
    folder: Path,
) -> SFTTrainer:
    """The trainer of a method, ready to train."""
    method = method_options(name)
    args = dict(
        output_dir=str(folder),
        seed=seed,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate * method.get("lr", 1.0),
        lr_scheduler_type="cosine",
        use_cpu=not torch.cuda.is_available(),
        bf16=options.dtype == "bfloat16",
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    shared = dict(model=model, processing_class=tokenizer, train_dataset=train, peft_config=lora)
    set_seed(seed)  # of the adapter's start
    if "agl" in method:
        if method.get("rows", True):
            config, rows = AGLSFTConfig(**args, **method["agl"]), base.protected
        else:
            config, rows = AGLSFTConfig(**args, fisher_path=str(base.statistics), **method["agl"]), None
        trainer = AGLSFTTrainer(args=config, alignment_dataset=rows, **shared)
    else:
        trainer = method.get("trainer", SFTTrainer)(args=SFTConfig(**args), **shared)
        if isinstance(trainer, SafeLoraTrainer):
            trainer.before = load_model(str(options.before), dtype=options.dtype)[0]
        else:
            give_rows(trainer, base.protected, seed)
    if "callback" in method:
        trainer.add_callback(method["callback"](trainer, base.protected, seed))
    trainer.remove_callback(PrinterCallback)
    return trainer


def give_rows(trainer: SFTTrainer, protected: list[dict[str, Any]], seed: int) -> None:
    """The protected rows, of both kinds and in an order by seed, to a baseline that holds some."""
    order = torch.randperm(len(protected), generator=torch.Generator().manual_seed(seed)).tolist()
    if isinstance(trainer, EWCTrainer):
        trainer.prepare([protected[i] for i in order[:EWC_ROWS]])
    elif isinstance(trainer, ReplayTrainer | KLTrainer | LaptTrainer):
        rows = [tokenize_row(protected[i], trainer.processing_class, LONGEST) for i in order]
        trainer.replay_rows = trainer.protected_rows = trainer.safety_rows = rows
