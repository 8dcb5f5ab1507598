"""The core as a callback: it protects a LoRA adapter in any Hugging Face `Trainer`."""

from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy

from ..drift.report import DriftReport
from .checks import Rows, check_push, withheld
from .config import AlignGuardConfig
from .evidence import save_evidence, sha256_when_saved
from .gradients import add_gradients, before_step_of_deepspeed, unscale
from .guard import Guard
from .resume import CheckpointState, checkpoint_state, checkpoint_statistics, is_of, resumed_from, step_of_weights
from .trackers import call_before_trackers, calling_handler, log_report


class AlignGuardCallback(Guard, TrainerCallback):
    """
    Keeps the alignment of the model that a `Trainer` fine-tunes with LoRA: `transformers.Trainer`, TRL's trainers, or any
    other that fires its events. It takes statistics of the alignment rows before the first step, adds the gradient of
    AlignGuard's terms to that of the task right before every optimizer step (after accumulation, averaging over processes
    and clipping, so that its weight is exact), projects the weights where the KL on protected rows is too large, holds a drift
    budget right after the step, shrinks the update at the end until the KL budget holds, logs `agl/*` metrics, and saves
    statistics, reference answers and report in `agl/` of every checkpoint and, at the end, of the output folder.

    The AGL trainers install it by themselves, and add what a callback can't do: the evidence in the same commit as the
    adapter, and the card. Trackers get the `agl/*` metrics from either: at the begin of a training the callback moves itself before
    them. At the end TensorBoard, Trackio and Weights & Biases get the picture of the drift and a table of it by layer.

    Args:
        config ([`AlignGuardConfig`], *optional*):
            What is switched on; by default a KL budget.
        alignment_dataset (`Dataset`, `IterableDataset` or `Sequence[dict]`, *optional*):
            Rows whose behaviour must not change, in one of TRL's formats; of rows with a boolean column `unsafe`, those marked are to
            be refused and carry the statistics, and the others to be answered. Not needed where `config.fisher_path` names saved
            statistics. By default the model's own answers to the requests of DriftCaps' protection split, unsafe ones and those
            that look like them.
        protect (`dict`, *optional*):
            Rows of other behaviours by name, such as `{"chat": rows, "text": [{"text": "..."}]}`: the model's own answers to rows
            with a prompt alone, or given ones. Each has the `kl_budget` for itself, or its own of `config.kl_budgets`.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer of the model; by default the trainer's.

    Raises:
        `ValueError`: If the configuration switches AGL off, or the model has no adapter, or the engine is not supported.

    Example:

    ```python
    from agl_trl import AlignGuardCallback, AlignGuardConfig
    from transformers import Trainer

    guard = AlignGuardCallback(AlignGuardConfig(kl_budget=0.02), alignment_dataset=rows, processing_class=tokenizer)
    trainer = Trainer(model=peft_model, args=args, train_dataset=dataset, callbacks=[guard])
    trainer.train()
    print(guard.report.summary())
    ```
    """

    def __init__(
        self,
        config: AlignGuardConfig | None = None,
        alignment_dataset: Rows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        protect: dict[str, Rows] | None = None,
    ):
        super().__init__(
            AlignGuardConfig() if config is None else config, alignment_dataset, processing_class, protect
        )
        self.resume_from: str | Path | None = None  # a trainer of ours knows
        self._handler: CallbackHandler | None = None  # callbacks of the trainer, trackers among them
        self._metrics: dict[str, list[Tensor]] = {}

    def _withheld(self) -> list[str]:
        """Names of the files that a push must not take: the push of a trainer takes all that lies in its folder."""
        return withheld(self.config)

    def prepare(self, args: TrainingArguments, model: Any, processing_class: Any) -> None:
        if args.push_to_hub:
            check_push(args, self._withheld())
        super().prepare(args, model, processing_class)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_push(args, self._withheld())  # also where nothing said before that anything would be pushed

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.statistics, self.layers, self.regularizer = None, [], None  # of an earlier trainer
        self.references = self.protection = None
        self.prepare(args, model, kwargs.get("processing_class"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if not is_of(model, self.layers):  # added after the trainer was built, or `model_init` has made another model
            self.on_init_end(args, state, control, model, **kwargs)
        self._handler = calling_handler()
        if self._handler is not None:
            call_before_trackers(self._handler, self)
        self._deepspeed = AcceleratorState().deepspeed_plugin is not None
        checkpoint, begun = self.resume_from or resumed_from(args, state, model), CheckpointState()
        if checkpoint is not None:
            self._use(checkpoint_statistics(checkpoint, self.statistics), model)
            self.layers, begun = checkpoint_state(checkpoint, model)
            self.references = begun.references or self.references
        if self.regularizer is None or checkpoint is not None:  # not again when the batch size is lowered
            self.build(args, model, kwargs["train_dataloader"].dataset, begun)
        if self.protection is not None:
            self.protection.forget()  # of an earlier training by the same trainer
        self._held, self._metrics = None, {}
        if self.drift_eval is not None:
            self.drift_eval.begin(model, self.layers, state, self._handler)
        if self._deepspeed:
            before_step_of_deepspeed(kwargs["optimizer"], lambda engine: self._add(args, state, model, engine))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if not self._deepspeed:  # whose step is over by now
            unscale(kwargs["optimizer"], clipped=args.max_grad_norm > 0)
            self._add(args, state, model)

    def _add(self, args: TrainingArguments, state: TrainerState, model: PeftModel, engine: Any = None) -> None:
        assert self.regularizer is not None, "training has begun"
        step = state.global_step
        terms, gradients = self.regularizer.gradients(step)
        add_gradients(self.regularizer.parameters, gradients, engine)
        del gradients  # before the anchor's forward pass
        region = self.regularizer.trust_region
        if self.protection is not None:
            anchored = self.protection.protect(model, step, engine)
            terms["penalty"] = terms["penalty"] + anchored.pop("penalty", 0)
            terms |= anchored
            if region is not None and "kl_budget_share" in anchored:
                region.observe(anchored["kl_budget_share"], terms["relative_drift"])
        if region is not None:
            terms["drift_limit"] = region.limit()
        for name, value in terms.items():
            self._metrics.setdefault(f"agl/{name}", []).append(value)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.regularizer is not None, "training has begun"
        self.regularizer.hold()

    def take_metrics(self) -> dict[str, float]:
        """Means of the terms since the last call, and what the model was asked."""
        taken = {name: torch.stack(values).mean().item() for name, values in self._metrics.items()}
        self._metrics = {}  # reading them was the only wait for the device
        return taken if self.drift_eval is None else taken | self.drift_eval.take_metrics()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs and self._metrics:
            metrics = self.take_metrics()
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def _step_of(self, step: int) -> int:
        """Step of the weights that a step left."""
        return step if self.drift_eval is None else self.drift_eval.step_of(step)

    def end(self, args: TrainingArguments, state: TrainerState, model: PeftModel) -> DriftReport:
        """
        Hold the weights that a training ends with: to the KL budget, and to what the model must still answer.

        Args:
            args (`TrainingArguments`):
                Arguments of the trainer.
            state (`TrainerState`):
                Its state.
            model (`PeftModel`):
                Its model.
        """
        step = self._step_of(step_of_weights(args, state))
        self.hold(model, step)
        if self.drift_eval is not None:
            step = self.drift_eval.settle(model, step)
            self.hold(model, step)
        return self.measure(model, state, step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        pushed = args.push_to_hub and args.hub_strategy != HubStrategy.END
        step, last = state.global_step, state.global_step >= state.max_steps
        # Which weights are the best is known after the evaluation, and then they are saved at once.
        saved = control.should_save or (control.should_evaluate and args.save_strategy == SaveStrategy.BEST)
        # Before anybody gets it. Some front ends leave the last checkpoint as their result, and save nothing after the end.
        if (saved and (pushed or last)) or (last and self.drift_eval is not None):
            self.hold(model, self._step_of(step))
        if self.drift_eval is not None and self.drift_eval.check(model, args, state, control):
            self.hold(model, self._step_of(step))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control, model)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self._save(args, folder, self.measure(model, state, self._step_of(state.global_step)), [])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        report = self.end(args, state, model)
        report.adapter_sha256 = sha256_when_saved(model, self.layers[0].adapter)  # the user saves it after this
        # A checkpoint holds all: a run goes on from it, and it is not pushed where anything is withheld.
        self._save(args, Path(args.output_dir), report, self._withheld() if args.push_to_hub else [])
        self._log_report(state, report)

    def _log_report(self, state: TrainerState, report: DriftReport) -> None:
        if self._handler is not None and state.is_world_process_zero:
            log_report(self._handler.callbacks, report, state.global_step)

    def _save(self, args: TrainingArguments, folder: Path, report: DriftReport, left_out: list[str]) -> None:
        if args.should_save:
            assert self.statistics is not None, "measured with them"
            save_evidence(folder, self.statistics, self.references, report, self.layers, left_out)
