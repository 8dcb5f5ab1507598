"""AGL trainers: one mixin over TRL's trainers."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainingArguments
from trl import DPOTrainer, SFTTrainer
from trl.models.activation_offloading import NoOpManager

from ..artifacts.files import ArtifactError
from ..data.alignment import PROTECTED_COLUMN, driftcaps_requests, is_prompt_only, select_rows, tokenize_row
from ..drift.report import DriftReport
from ..evaluation.behaviour import Behaviour, measure_behaviour
from ..fisher.estimate import estimate_fisher
from ..fisher.statistics import FisherStatistics
from ..modeling.lora import AdaptedLayer, adapted_layers, at_reference, linear_layers, trained_outside_lora
from .checks import check_arguments, check_run
from .config import AGLConfigMixin, AGLDPOConfig, AGLSFTConfig
from .memory import give_back
from .regularizer import Guard, build_anchor, coefficients_of, settings_of
from .resume import checkpoint_state, checkpoint_statistics
from .saving import SavingMixin


logger = get_logger(__name__)


class _AlignGuardMixin(SavingMixin):
    """
    Adds the AlignGuard penalty to the loss of a TRL trainer, and its evidence to everything the trainer saves. The rest
    is inherited unchanged; with `alignment_coef=0` all of it is.
    """

    config_class: ClassVar[type[AGLConfigMixin]]

    def __init__(
        self,
        *positional: Any,
        alignment_dataset: Dataset | IterableDataset | Sequence[dict[str, Any]] | None = None,
        **named: Any,
    ):
        # By name, because TRL's trainers order their arguments differently.
        given = signature(super().__init__).bind(*positional, **named).arguments
        args = given["args"] = self._own_config(given["model"], given.get("args"))
        if args.agl_enabled and alignment_dataset is None and args.fisher_path is None:
            alignment_dataset = driftcaps_requests()
            logger.warning(
                f"Nothing says which behaviour to keep, so that AGL keeps the model's own answers to the {len(alignment_dataset)} unsafe "
                "requests of DriftCaps' protection split. Pass `alignment_dataset=` or set `fisher_path` to choose."
            )
        if args.agl_enabled:
            check_arguments(given["model"], args, given.get("peft_config"), alignment_dataset)
        self._pushes, self._pusher = [], ThreadPoolExecutor(max_workers=1)
        super().__init__(**given)
        self.alignment_dataset = alignment_dataset
        self.statistics: FisherStatistics | None = None
        self._guarded: list[AdaptedLayer] = []
        self._guard: Guard | None = None
        self._budget_hook: RemovableHandle | None = None
        self._best_step: int | None = None  # of the weights that `load_best_model_at_end` put back
        self._measured: tuple[int, Behaviour] | None = None  # step and answers of the last report with prompts
        self._report: DriftReport | None = None
        if args.agl_enabled:
            check_run(args, self.processing_class, self.accelerator, self.is_fsdp_enabled)
            self._start_guard()

    @classmethod
    def _own_config(cls, model: str | PreTrainedModel | PeftModel, args: TrainingArguments | None) -> AGLConfigMixin:
        """The given arguments as this trainer's config: nobody is left unprotected without having said so."""
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            return cls.config_class(f"{Path(name).name or 'model'}-AGL")
        if isinstance(args, cls.config_class):
            return args
        values = args.to_dict()  # hides everything called token
        return cls.config_class(
            **{key: getattr(args, key) if key.endswith("_token") else values[key] for key in values}
        )

    def _start_guard(self) -> None:
        self._guarded = adapted_layers(self.model)
        if not self._guarded:
            raise ValueError("The adapter has no LoRA layer that AGL could guard.")
        if any(layer.has_moved() for layer in self._guarded):  # a continued adapter: its start is the reference
            self._guarded = [layer.with_reference() for layer in self._guarded]
        if outside := trained_outside_lora(self.model):
            logger.warning(
                f"AGL guards LoRA layers only; {len(outside)} other trainable tensors (such as '{outside[0]}') are free to drift."
            )
        if self.args.fisher_path is not None:
            self._use(FisherStatistics.from_pretrained(self.args.fisher_path))
        else:
            (row,) = select_rows(self.alignment_dataset, 1, self.args.seed)
            if not is_prompt_only(row):
                tokenize_row(row, self._tokenizer, self.args.max_length)
            elif self.is_fsdp_enabled:
                raise ValueError(
                    "Rows without answers are answered by the model, which can't generate under FSDP: pass `alignment_dataset=` with answers, "
                    "or set `fisher_path`."
                )
        self.model.add_model_tags(self._AGL_TAG)

    def _use(self, statistics: FisherStatistics) -> None:
        statistics.check_fits(self.model, linear_layers(self.model))
        if self.args.variant == "paper" and not statistics.outputs:
            raise ArtifactError(
                "`variant='paper'` projects on the output side, which these Fisher statistics do not hold: estimate them with "
                "shrinkage 0 and type `empirical`."
            )
        self.statistics = statistics

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.args.agl_enabled:
            self._best_step, multiplier = None, 0.0
            if resume_from_checkpoint is not None:
                self._use(checkpoint_statistics(resume_from_checkpoint, self.statistics))
                self._guarded, multiplier = checkpoint_state(resume_from_checkpoint, self.model)
            elif self.statistics is None:
                with at_reference(self.model, self._guarded):
                    self.statistics = self._estimate(self.alignment_dataset)
            if self._guard is None or resume_from_checkpoint is not None:  # not again when the batch size is lowered
                self._start_training(multiplier)
            if self._guard.budget is not None:
                if self._budget_hook is not None:
                    self._budget_hook.remove()
                self._budget_hook = self.optimizer.optimizer.register_step_post_hook(
                    lambda *_: self._guard.after_step()
                )
        return prepared

    def _start_training(self, multiplier: float) -> None:
        """Build what every step needs; the model is at its reference weights, or the run is resumed."""
        anchor, task_statistics = None, None
        with at_reference(self.model, self._guarded):  # also when the run is resumed
            if self.args.variant == "kfac" and coefficients_of(self.args).needs_task_fisher:
                rows = self.train_dataset
                if rows.column_names is not None and PROTECTED_COLUMN in rows.column_names:
                    rows = rows.remove_columns(PROTECTED_COLUMN)  # it marks alignment rows
                task_statistics = self._estimate(rows)
            if self.args.anchor_coef > 0:
                anchor = build_anchor(self.args, self.model, self._tokenizer, self.alignment_dataset)
        assert self.statistics is not None
        self._guard = Guard(self.args, self._guarded, self.statistics, task_statistics, anchor, multiplier)
        give_back()  # what the passes over the rows have freed

    def _estimate(self, dataset: Dataset | IterableDataset | Sequence[dict[str, Any]]) -> FisherStatistics:
        args = self.args
        return estimate_fisher(
            self.model,
            dataset,
            self._tokenizer,
            fisher_type=args.fisher_type,
            shrinkage=args.fisher_shrinkage,
            rank=args.fisher_rank,
            num_samples=args.fisher_num_samples,
            batch_size=args.fisher_batch_size,
            max_length=args.max_length,
            seed=args.seed,
            progress=not args.disable_tqdm,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Parameters do not move within an accumulation window: once per optimizer step is exact.
        guard = self._guard if self.model.training and self.accelerator.sync_gradients else None
        if guard is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        step = self.state.global_step
        anchor_kl = None
        # FSDP frees the weights of a first forward once it has gone back through a second: one after the other there.
        if self.is_fsdp_enabled:
            anchor_kl = guard.anchor_kl(self.model, step)
            if anchor_kl is not None:
                self.accelerator.backward(guard.anchor_coef * anchor_kl)
                anchor_kl = anchor_kl.detach()
        outcome = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with NoOpManager():  # activation offloading would send the penalty's factors to the CPU
            terms = guard.terms(step)
        if not self.is_fsdp_enabled:
            anchor_kl = guard.anchor_kl(self.model, step)
        if anchor_kl is not None:
            terms["anchor_kl"] = anchor_kl
            terms["penalty"] = terms["penalty"] + guard.anchor_coef * anchor_kl
        for name, value in terms.items():
            self._metrics["train"][f"agl/{name}"].append(value.detach())
        penalty = terms["penalty"] * self._accumulation_divisor(num_items_in_batch)
        return (outcome[0] + penalty, outcome[1]) if return_outputs else outcome + penalty

    def _accumulation_divisor(self, num_items_in_batch: torch.Tensor | int | None) -> int:
        """What the Trainer will divide the returned loss by for gradient accumulation, so that the penalty keeps weight 1."""
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        return 1 if scaled else self.current_gradient_accumulation_steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            metrics = self._metrics["train"]
            for key in [key for key in metrics if key.startswith("agl/")]:
                metrics[key] = [torch.stack(metrics[key]).mean().item()]  # the only host sync, once per log
        super().log(logs, start_time)

    def drift_report(self, prompts: Dataset | None = None, **kwargs: Any) -> DriftReport:
        """
        Measure how far the adapter has moved the model, as it is now.

        Args:
            prompts (`Dataset`, *optional*):
                Prompts to ask base and tuned model, as in [`measure_behaviour`], which `kwargs` go to.

        Raises:
            `ValueError`: If there are no statistics yet, because training has not started.
        """
        if self.statistics is None:
            raise ValueError("There are no Fisher statistics before training has started.")
        report = self._report = DriftReport.measure(self.model, self.statistics, layers=self._guarded)
        logged = [entry for entry in self.state.log_history if "agl/relative_drift" in entry and "loss" in entry]
        keys = {"step": "step", "relative_drift": "agl/relative_drift", "penalty": "agl/penalty", "loss": "loss"}
        report.history = {name: torch.tensor([float(entry[key]) for entry in logged]) for name, key in keys.items()}
        report.global_step = self._step_of_weights
        report.metadata["coefficients"] = settings_of(self.args)
        report.metadata["continued"] = self._guarded[0].reference is not None
        if self._guard is not None and self._guard.budget is not None:
            report.budget_multiplier = self._guard.budget.multiplier.item()
        if prompts is not None:
            report.behaviour = measure_behaviour(self.model, self._tokenizer, prompts, layers=self._guarded, **kwargs)
            self._measured = report.global_step, report.behaviour
        elif self._measured is not None and self._measured[0] == report.global_step:
            report.behaviour = self._measured[1]  # answers of these very weights, so that a push keeps them
        return report

    @property
    def _step_of_weights(self) -> int:
        return self.state.global_step if self._best_step is None else self._best_step

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._best_step = self.state.best_global_step


class AGLSFTTrainer(_AlignGuardMixin, SFTTrainer):
    """
    [`~trl.SFTTrainer`] that keeps the alignment of the model it fine-tunes. The only change is the alignment penalty in
    the loss, taken from statistics of `alignment_dataset` before the first step, and the evidence saved with the adapter.
    """

    config_class = AGLSFTConfig


class AGLDPOTrainer(_AlignGuardMixin, DPOTrainer):
    """
    [`~trl.DPOTrainer`] that keeps the alignment of the model it trains, as [`AGLSFTTrainer`] does. Of an adapter that
    TRL copies as reference (`"ref"`), only the trained one is guarded and saved.
    """

    config_class = AGLDPOConfig
    _reference_adapter = "ref"
