"""The core as a callback: it protects a LoRA adapter in any Hugging Face `Trainer`."""

from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..artifacts.files import TAG, ArtifactError
from ..data.alignment import driftcaps_requests, pad_token_id, select_rows, tokenize_rows
from ..data.labels import PROTECTED_COLUMN
from ..data.rows import ANSWERS, Row, is_prompt_only
from ..drift.report import DriftReport
from ..fisher.estimate import estimate_fisher
from ..fisher.statistics import FisherStatistics
from ..modeling.generation import answered_by, context_length
from ..modeling.lora import AdaptedLayer, adapted_layers, at_reference, linear_layers, trained_outside_lora
from .anchor import Anchor
from .checks import Rows, check_adapter, check_engine, check_processor, check_rows, check_writable
from .config import AlignGuardConfig
from .evidence import drift_of, save_evidence, sha256_when_saved
from .gradients import add_anchor, add_gradients, before_step_of_deepspeed, unscale
from .regularizer import Regularizer, coefficients_of
from .resume import checkpoint_state, checkpoint_statistics, resumed_from


logger = get_logger(__name__)


class AlignGuardCallback(TrainerCallback):
    """
    Keeps the alignment of the model that a `Trainer` fine-tunes with LoRA: `transformers.Trainer`, TRL's trainers, or any
    other that fires its events. It takes statistics of the alignment rows before the first step, adds the gradient of
    AlignGuard's terms to that of the task right before every optimizer step (after accumulation, averaging over processes
    and clipping, so that its weight is exact), holds the drift budget right after it, logs `agl/*` metrics, and saves
    `agl/fisher.safetensors` and `agl/drift.safetensors` in every checkpoint and, at the end, in the output folder.

    The AGL trainers install it by themselves, and add what a callback can't do: the evidence in the same commit as the
    adapter, the card, and metrics that reach every tracker. Trackers of a plain `Trainer` are called before this callback
    and don't see its metrics; the log history and the progress bar do.

    Args:
        config ([`AlignGuardConfig`], *optional*):
            What is switched on; by default a drift budget.
        alignment_dataset (`Dataset`, `IterableDataset` or `Sequence[dict]`, *optional*):
            Rows whose behaviour must not change, in one of TRL's formats; of rows with a boolean column `unsafe`, those marked.
            Not needed where `config.fisher_path` names saved statistics. By default the model's own answers to the unsafe
            requests of DriftCaps' protection split.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer of the model; by default the trainer's.

    Raises:
        `ValueError`: If the configuration switches AGL off, or the model has no adapter, or the engine is not supported.

    Example:

    ```python
    from agl_trl import AlignGuardCallback, AlignGuardConfig
    from transformers import Trainer

    guard = AlignGuardCallback(AlignGuardConfig(drift_budget=3e-3), alignment_dataset=rows, processing_class=tokenizer)
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
    ):
        self.config = AlignGuardConfig() if config is None else config
        if not self.config.agl_enabled:
            raise ValueError("This configuration switches AGL off: leave the callback out.")
        self.alignment_dataset, self.processing_class = alignment_dataset, processing_class
        if alignment_dataset is None and self.config.fisher_path is None:
            self.alignment_dataset = driftcaps_requests()
            logger.warning(
                f"Nothing says which behaviour to keep, so that AGL keeps the model's own answers to the {len(self.alignment_dataset)} "
                "unsafe requests of DriftCaps' protection split. Pass `alignment_dataset=` or set `fisher_path` to choose."
            )
        self.statistics: FisherStatistics | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None  # of the trainer at hand
        self.layers: list[AdaptedLayer] = []
        self.regularizer: Regularizer | None = None
        self.report: DriftReport | None = None
        self.resume_from: str | Path | None = None  # a trainer of ours knows
        self._metrics: dict[str, list[Tensor]] = {}
        self._deepspeed = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.statistics, self.layers, self.regularizer = None, [], None  # of an earlier trainer
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
        check_rows(self.config, model, self.tokenizer, self.alignment_dataset, args)
        if self.config.fisher_path is not None:
            self._use(FisherStatistics.from_pretrained(self.config.fisher_path), model)
        model.add_model_tags(TAG)

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
        checkpoint, multiplier = self.resume_from or resumed_from(args, state), 0.0
        if checkpoint is not None:
            self._use(checkpoint_statistics(checkpoint, self.statistics), model)
            self.layers, multiplier = checkpoint_state(checkpoint, model)
        if self.regularizer is None or checkpoint is not None:  # not again when the batch size is lowered
            self.regularizer = self._regularizer(args, model, kwargs["train_dataloader"].dataset, multiplier)
        self._metrics = {}
        self._deepspeed = AcceleratorState().deepspeed_plugin is not None
        if self._deepspeed:
            before_step_of_deepspeed(kwargs["optimizer"], lambda engine: self._add(args, state, model, engine))

    def _regularizer(
        self, args: TrainingArguments, model: PeftModel, train_rows: Any, multiplier: float
    ) -> Regularizer:
        """Build what every step needs; the model is at its reference weights, or the run is resumed."""
        config, anchor, task_statistics = self.config, None, None
        with at_reference(model, self.layers):  # also when the run is resumed
            rows: list[Row] = []
            if self.statistics is None or config.anchor_coef > 0:
                rows = self._answered_rows(args, model)
            if self.statistics is None:
                self.statistics = self._estimate(args, model, rows)
            if config.variant == "kfac" and coefficients_of(config).needs_task_fisher:
                # The mark is for alignment rows; what a reward function compares with is no answer of the model.
                others = {PROTECTED_COLUMN, *ANSWERS[1:]} & {*(train_rows.column_names or ())}
                if others:
                    train_rows = train_rows.remove_columns(sorted(others))
                task_statistics = self._estimate(args, model, train_rows)
            if config.anchor_coef > 0:
                assert self.tokenizer is not None, "checked"
                length, context = config.fisher_max_length, context_length(model)
                tokenized = tokenize_rows(rows, self.tokenizer, length, context)
                pad = pad_token_id(self.tokenizer)
                anchor = Anchor(model, tokenized, pad, config.anchor_every, config.anchor_batch_size, args.seed)
        assert self.statistics is not None
        return Regularizer(config, self.layers, self.statistics, task_statistics, anchor, multiplier, seed=args.seed)

    def _answered_rows(self, args: TrainingArguments, model: PeftModel) -> list[Row]:
        """The alignment rows of this run, chosen once; those without an answer get the model's own."""
        assert self.alignment_dataset is not None and self.tokenizer is not None, "checked"
        rows = select_rows(self.alignment_dataset, self.config.fisher_num_samples, args.seed)
        if any(map(is_prompt_only, rows)):
            return answered_by(model, self.tokenizer, rows, not args.disable_tqdm)
        return rows

    def _estimate(self, args: TrainingArguments, model: PeftModel, rows: Rows) -> FisherStatistics:
        config = self.config
        assert self.tokenizer is not None, "checked"
        return estimate_fisher(
            model,
            rows,
            self.tokenizer,
            fisher_type=config.fisher_type,
            shrinkage=config.fisher_shrinkage,
            rank=config.fisher_rank,
            num_samples=config.fisher_num_samples,
            batch_size=config.fisher_batch_size,
            max_length=config.fisher_max_length,
            seed=args.seed,
            progress=not args.disable_tqdm,
        )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if not self._deepspeed:  # whose step is over by now
            unscale(kwargs["optimizer"], clipped=args.max_grad_norm > 0)
            self._add(args, state, model)

    def _add(self, args: TrainingArguments, state: TrainerState, model: PeftModel, engine: Any = None) -> None:
        assert self.regularizer is not None, "training has begun"
        step, anchor, weight = state.global_step, self.regularizer.anchor, self.config.anchor_coef
        terms, gradients = self.regularizer.gradients(step)
        add_gradients(self.regularizer.parameters, gradients, engine)
        del gradients  # before the anchor's forward pass
        if anchor is not None and anchor.due(step):
            terms["anchor_kl"] = add_anchor(anchor, model, step, weight, engine)
            terms["penalty"] = terms["penalty"] + weight * terms["anchor_kl"]
        for name, value in terms.items():
            self._metrics.setdefault(f"agl/{name}", []).append(value)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.regularizer is not None, "training has begun"
        self.regularizer.hold()

    def take_metrics(self) -> dict[str, float]:
        """Means of the terms since the last call."""
        taken = {name: torch.stack(values).mean().item() for name, values in self._metrics.items()}
        self._metrics = {}  # reading them was the only wait for the device
        return taken

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
            state,
            step=state.global_step if step is None else step,
        )
        return self.report

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self._save(args, folder, self.measure(model, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        report = self.measure(model, state, state.best_global_step if best else None)
        report.adapter_sha256 = sha256_when_saved(model, self.layers[0].adapter)  # the user saves it after this
        self._save(args, Path(args.output_dir), report)

    def _save(self, args: TrainingArguments, folder: Path, report: DriftReport) -> None:
        if args.should_save:
            assert self.statistics is not None, "measured with them"
            save_evidence(folder, self.statistics, report, self.layers)
