"""The questions of a run in any trainer, without any of AGL: plain LoRA that is watched, and stopped."""

from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..modeling.lora import AdaptedLayer, with_factors
from .drift_eval import DriftEval
from .drift_eval_config import DriftEvalConfig
from .resume import is_of, started, started_late, step_of_weights
from .trackers import call_before_trackers, calling_handler


class DriftEvalCallback(TrainerCallback):
    """
    Asks the model held-out prompts every so many steps, in any Hugging Face `Trainer` of an adapter, logs what is left of its refusals
    as `agl/eval_*`, stops the run where too much is lost, and puts the weights back that passed last. It trains nothing itself;
    [`AlignGuardCallback`] and the AGL trainers do the same by the options of the same names.

    Args:
        config ([`DriftEvalConfig`]):
            What is asked, when, and what ends the run.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer of the model; by default the trainer's.

    Raises:
        `ValueError`: If `drift_eval_steps` is not set.

    Example:

    ```python
    from agl_trl import DriftEvalCallback, DriftEvalConfig

    watch = DriftEvalCallback(DriftEvalConfig(drift_eval_steps=50, drift_stop="refusal_drop>0.1"))
    trainer = Trainer(..., callbacks=[watch])
    ```
    """

    def __init__(self, config: DriftEvalConfig, processing_class: PreTrainedTokenizerBase | None = None):
        if config.drift_eval_steps is None:
            raise ValueError("Nothing is asked: set `drift_eval_steps`, the steps between two times.")
        self.drift_eval, self.processing_class = DriftEval(config), processing_class
        self.layers: list[AdaptedLayer] | None = None

    def _prepare(self, model: Any, processing_class: Any) -> None:
        if not isinstance(model, PeftModel):
            raise TypeError(
                "DriftEvalCallback compares a model with its adapter off, but it has none: pass `peft_config` to the trainer."
            )
        self.drift_eval.prepare(model, processing_class if self.processing_class is None else self.processing_class)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._prepare(model, kwargs.get("processing_class"))
        self.layers = started(with_factors(model) or [])  # no checkpoint is loaded yet

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # Added after the trainer was built, or `model_init` has made another model. An adapter of another method has no layers.
        if self.layers is None or (self.layers and not is_of(model, self.layers)):
            self._prepare(model, kwargs.get("processing_class"))
            self.layers = started_late(with_factors(model) or [], self.layers or [], state)
        handler = calling_handler()
        if handler is not None:
            call_before_trackers(handler, self)
        self.drift_eval.begin(model, self.layers, state, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.drift_eval.check(model, args, state, control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            metrics = self.drift_eval.take_metrics()
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.drift_eval.settle(model, self.drift_eval.step_of(step_of_weights(args, state)))
