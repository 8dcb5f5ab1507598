"""The core as a callback: it protects a LoRA adapter in any Hugging Face `Trainer`."""

from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from ..artifacts.files import TAG, ArtifactError
from ..data.alignment import driftcaps_requests
from ..drift.report import DriftReport
from ..fisher.calibration import calibrate, drift_at, is_calibrated
from ..fisher.protected_rows import ALIGNMENT
from ..fisher.reference_answers import ReferenceAnswers
from ..fisher.statistics import FisherStatistics
from ..modeling.lora import AdaptedLayer, adapted_layers, at_reference, linear_layers, trained_outside_lora
from .checks import (
    Rows,
    check_adapter,
    check_engine,
    check_processor,
    check_protect,
    check_rows,
    check_writable,
)
from .config import AlignGuardConfig
from .drift_eval import DriftEval
from .evidence import drift_of, save_evidence, sha256_when_saved
from .gradients import add_gradients, before_step_of_deepspeed, unscale
from .protection import Protection
from .reference import ReferenceTaker, published_references, translated_budget
from .regularizer import Regularizer, coefficients_of
from .resume import CheckpointState, checkpoint_state, checkpoint_statistics, resumed_from, step_of_weights
from .trackers import call_before_trackers, calling_handler, log_report


logger = get_logger(__name__)


class AlignGuardCallback(TrainerCallback):
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
        self.config = AlignGuardConfig() if config is None else config
        if not self.config.agl_enabled:
            raise ValueError("This configuration switches AGL off: leave the callback out.")
        self.alignment_dataset, self.processing_class = alignment_dataset, processing_class
        self.protect = check_protect(self.config, protect or {})
        self._by_default = alignment_dataset is None and self.config.fisher_path is None
        if self._by_default:
            self.alignment_dataset = driftcaps_requests()
        self.drift_eval = None if self.config.drift_eval_steps is None else DriftEval(self.config)
        self.statistics: FisherStatistics | None = None
        self.references: ReferenceAnswers | None = None
        self.protection: Protection | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None  # of the trainer at hand
        self.layers: list[AdaptedLayer] = []
        self.regularizer: Regularizer | None = None
        self.report: DriftReport | None = None
        self.resume_from: str | Path | None = None  # a trainer of ours knows
        self._handler: CallbackHandler | None = None  # callbacks of the trainer, trackers among them
        self._held: int | None = None  # step of the weights that hold the KL budget
        self._metrics: dict[str, list[Tensor]] = {}
        self._deepspeed = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.statistics, self.layers, self.regularizer = None, [], None  # of an earlier trainer
        self.references = self.protection = None
        self.prepare(args, model, kwargs.get("processing_class"))

    def prepare(self, args: TrainingArguments, model: Any, processing_class: Any) -> None:
        """
        Everything that can be wrong is told here, before the first step; a continued adapter's start is kept.

        Args:
            args (`TrainingArguments`):
                Arguments of the trainer.
            model (`PeftModel`):
                Its model.
            processing_class (`PreTrainedTokenizerBase`, *optional*):
                Its tokenizer, where the callback was given none.
        """
        if self._by_default:  # not before: the logger needs the state of accelerate, which a trainer brings
            logger.warning(
                "Nothing says which behaviour to keep, so that AGL keeps the model's own answers to requests of DriftCaps' protection "
                "split, unsafe ones and those that look like them. Pass `alignment_dataset=` or set `fisher_path` to choose."
            )
        check_writable(args)
        check_adapter(model)
        processing_class = processing_class if self.processing_class is None else self.processing_class
        check_processor(processing_class)
        self.tokenizer = processing_class
        check_engine(args, self.config, AcceleratorState())
        self.layers = adapted_layers(model)
        if not self.layers:
            raise ValueError("The adapter has no LoRA layer that AGL could guard.")
        if any(layer.has_moved() for layer in self.layers):  # a continued adapter: its start is the reference
            self.layers = [layer.with_reference() for layer in self.layers]
        if outside := trained_outside_lora(model):
            logger.warning(
                f"AGL guards LoRA layers only; {len(outside)} other trainable tensors (such as '{outside[0]}') are free to drift."
            )
        check_rows(self.config, model, self.tokenizer, self.alignment_dataset, self.protect, args)
        if self.config.fisher_path is not None:
            self._use(FisherStatistics.from_pretrained(self.config.fisher_path), model)
            if self._anchored(model) and self.alignment_dataset is None:
                self.references = published_references(self.config.fisher_path)
                if self.references is None and not self.protect and self.config.kl_budget is None:
                    raise ValueError(
                        "`anchor_coef` needs rows to anchor on, and these statistics come without reference answers: pass "
                        "`alignment_dataset=`."
                    )
        if self.drift_eval is not None:
            self.drift_eval.prepare(model, self.tokenizer)
        model.add_model_tags(TAG)

    def _anchored(self, model: PeftModel) -> bool:
        """Whether protected rows hold the run: not those of a model that predicts no tokens, such as one with a reward head."""
        return self.config.anchored and model.get_output_embeddings() is not None

    def _use(self, statistics: FisherStatistics, model: PeftModel) -> None:
        statistics.check_fits(model, linear_layers(model))
        if self.config.variant == "paper" and not statistics.outputs:
            raise ArtifactError(
                "`variant='paper'` projects on the output side, which these Fisher statistics do not hold: estimate them with "
                "shrinkage 0 and type `empirical`."
            )
        self.statistics = statistics

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if not self.layers:  # added after the trainer was built
            self.prepare(args, model, kwargs.get("processing_class"))
        self._handler = calling_handler()
        if self._handler is not None:
            call_before_trackers(self._handler, self)
        self._deepspeed = AcceleratorState().deepspeed_plugin is not None
        checkpoint, begun = self.resume_from or resumed_from(args, state), CheckpointState()
        if checkpoint is not None:
            self._use(checkpoint_statistics(checkpoint, self.statistics), model)
            self.layers, begun = checkpoint_state(checkpoint, model)
            self.references = begun.references or self.references
        if self.regularizer is None or checkpoint is not None:  # not again when the batch size is lowered
            self._build(args, model, kwargs["train_dataloader"].dataset, begun)
        if self.protection is not None:
            self.protection.forget()  # of an earlier training by the same trainer
        self._held, self._metrics = None, {}
        if self.drift_eval is not None:
            self.drift_eval.begin(model, self.layers, state, self._handler)
        if self._deepspeed:
            before_step_of_deepspeed(kwargs["optimizer"], lambda engine: self._add(args, state, model, engine))

    def _build(self, args: TrainingArguments, model: PeftModel, train_rows: Any, begun: CheckpointState) -> None:
        """Build what every step needs; the model is at its reference weights, or the run is resumed."""
        config, task_statistics = self.config, None
        with at_reference(model, self.layers):  # also when the run is resumed
            anchored = self._anchored(model) and self._has_rows
            if self.tokenizer is not None:
                taker = ReferenceTaker(config, args, model, self.tokenizer)
                taken = self.references is not None and (begun.references is not None or not self.protect)
                if self.statistics is None or (anchored and not taken):
                    self._take(taker, anchored)
                if config.variant == "kfac" and coefficients_of(config).needs_task_fisher:
                    task_statistics = taker.task_statistics(train_rows)
            assert self.statistics is not None, "checked"
            if self.references is not None:
                self.references.check_fits(model)
                if self._has_region and not is_calibrated(self.statistics):
                    progress = not args.disable_tqdm
                    calibrate(model, self.statistics, self.references, seed=args.seed, progress=progress)
        share = None
        if self.references is not None:
            self.protection = Protection(config, self.references, self.layers, args.seed)
            if self._has_region:
                assert config.kl_budget is not None, "checked"
                # Of a run that begins, as the curve has it where a gradient's direction reaches the budget.
                share = begun.share_per_drift or 1 / drift_at(self.statistics, config.kl_budget)[0]
        self.regularizer = Regularizer(
            config,
            self.layers,
            self.statistics,
            task_statistics,
            drift_budget=self._drift_budget(),
            share_per_drift=share,
            multiplier=begun.multiplier,
            seed=args.seed,
        )

    @property
    def _has_region(self) -> bool:
        """Whether a trust region holds the run, which needs rows to learn how large it may be; DeepSpeed's weights can't be moved."""
        return self.config.kl_budget is not None and self.config.trust_radius is not None and not self._deepspeed

    @property
    def _has_rows(self) -> bool:
        return self.alignment_dataset is not None or bool(self.protect) or self.references is not None

    def _take(self, taker: ReferenceTaker, anchored: bool) -> None:
        """Statistics and reference answers of the rows of this run, which are chosen and answered once."""
        refusals = []
        if self.alignment_dataset is not None:
            refusals = taker.answered(self.alignment_dataset, self.config.fisher_num_samples, unsafe=True)
        if self.statistics is None:
            self.statistics = taker.statistics(refusals)
        if anchored:
            own = taker.references(refusals, self.alignment_dataset, self.protect)
            self.references = own if self.references is None else self.references.joined(own)

    def _drift_budget(self) -> float | None:
        """The limit on the relative drift: the given one, or what a KL budget comes to where there are no rows to measure it on."""
        config = self.config
        measurable = self.references is not None and ALIGNMENT in self.references.behaviours
        if config.kl_budget is None or config.drift_budget is not None or measurable:
            return config.drift_budget
        assert self.statistics is not None, "there by now"
        return translated_budget(self.statistics, config.kl_budget)

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

    def measure(self, model: PeftModel, state: TrainerState, step: int | None = None) -> DriftReport:
        """
        Drift of the adapter as it is now.

        Args:
            model (`PeftModel`):
                Model of the trainer.
            state (`TrainerState`):
                Its state.
            step (`int`, *optional*):
                Training step of the weights; by default the present one.

        Raises:
            `ValueError`: If there are no statistics yet, because training has not started.
        """
        if self.statistics is None:
            raise ValueError("There are no Fisher statistics before training has started.")
        self.report = drift_of(
            model,
            self.config,
            self.statistics,
            self.layers,
            self.regularizer,
            self.protection,
            state,
            step=state.global_step if step is None else step,
        )
        return self.report

    def hold(self, model: PeftModel, step: int) -> None:
        """
        Measure the KL on all protected rows, and shrink the update until it is within its budget. Once for the weights of a step.

        Args:
            model (`PeftModel`):
                Model of the trainer.
            step (`int`):
                Training step of the weights.
        """
        if self.protection is not None and step != self._held:
            self.protection.hold(model)
            self._held = step

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
        # Before anybody gets it. Some front ends leave the last checkpoint as their result, and save nothing after the end.
        if (control.should_save and (pushed or last)) or (last and self.drift_eval is not None):
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
        self._save(args, folder, self.measure(model, state, self._step_of(state.global_step)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        report = self.end(args, state, model)
        report.adapter_sha256 = sha256_when_saved(model, self.layers[0].adapter)  # the user saves it after this
        self._save(args, Path(args.output_dir), report)
        self._log_report(state, report)

    def _log_report(self, state: TrainerState, report: DriftReport) -> None:
        if self._handler is not None and state.is_world_process_zero:
            log_report(self._handler.callbacks, report, state.global_step)

    def _save(self, args: TrainingArguments, folder: Path, report: DriftReport) -> None:
        if args.should_save:
            assert self.statistics is not None, "measured with them"
            save_evidence(folder, self.statistics, self.references, report, self.layers)
