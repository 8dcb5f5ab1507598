"""Relative drift in the logs of any trainer, without any change of the training."""

from os import PathLike
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..fisher.statistics import FisherStatistics
from ..modeling.lora import AdaptedLayer, adapted_layers, linear_layers
from ..objective.quadratic_form import RelativeDrift
from .resume import is_of, started, started_late
from .trackers import call_before_trackers, calling_handler


class DriftCallback(TrainerCallback):
    """
    Logs the mean relative drift `‖ΔW‖²_𝓕 / ‖W‖²_𝓕` of a LoRA adapter as `agl/relative_drift`, in any Hugging Face
    `Trainer`. It only measures; training is left as it is. Under FSDP or DeepSpeed ZeRO-3 it does not run.

    It moves itself before the trackers of the trainer, so that they get the number.

    Args:
        statistics ([`FisherStatistics`] or `str`):
            Statistics of the base model, or where they are saved.

    Example:

    ```python
    trainer = GRPOTrainer(..., callbacks=[DriftCallback("path/to/statistics")])
    ```
    """

    def __init__(self, statistics: FisherStatistics | str | PathLike):
        if not isinstance(statistics, FisherStatistics):
            statistics = FisherStatistics.from_pretrained(statistics)
        self.statistics = statistics
        self.layers: list[AdaptedLayer] = []
        self.drift: RelativeDrift | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # Once, and before a checkpoint is loaded: the drift counts from here.
        self.layers = started(adapted_layers(model))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if not isinstance(model, PeftModel):
            raise TypeError(
                "DriftCallback measures a LoRA adapter, but the model has none: pass `peft_config` to the trainer."
            )
        handler = calling_handler()
        if handler is not None:
            call_before_trackers(handler, self)
        if not is_of(model, self.layers):  # added after the trainer was built, or `model_init` has made another model
            self.layers = started_late(adapted_layers(model), self.layers, state)
        self.statistics.check_fits(model, linear_layers(model))
        self.drift = self.statistics.drift_of(self.layers)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.drift is None or logs is None or "loss" not in logs:
            return
        with torch.no_grad():
            value = self.drift([layer.factors() for layer in self.layers]).mean().item()
        logs["agl/relative_drift"] = state.log_history[-1]["agl/relative_drift"] = value
