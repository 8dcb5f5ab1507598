"""What all AGL trainers share: a TRL trainer with the callback installed, and a report of its drift."""

import warnings
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..drift.report import DriftReport
from ..evaluation.behaviour import Behaviour, measure_behaviour
from ..fisher.statistics import FisherStatistics
from .callback import AlignGuardCallback
from .checks import Rows, check_adapter, check_writable
from .drift_eval_callback import DriftEvalCallback
from .saving import SavingMixin


class _InstalledCallback(AlignGuardCallback):
    """The callback of a trainer that saves its evidence itself, in the same commit as the adapter."""

    def _withheld(self) -> list[str]:
        return []  # its trainer chooses what it pushes

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._log_report(state, self.end(args, state, model))


class AlignGuardMixin(SavingMixin):
    """
    A TRL trainer that installs [`AlignGuardCallback`] and saves its evidence with the adapter. The rest is inherited
    unchanged; with everything of AGL off no callback is there, and all of it is.
    """

    config_class: ClassVar[Any]  # a trainer's arguments with those of [`AlignGuardConfig`]

    def _install(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TrainingArguments | None,
        peft_config: PeftConfig | None,
        callbacks: list[TrainerCallback] | None,
        alignment_dataset: Rows | None,
        protect: dict[str, Rows] | None,
    ) -> dict[str, Any]:
        """Arguments of the parent: those given, as this trainer's config, and the callback before all others."""
        config = self._own_config(model, args)
        self._start_pushing()
        self.align_guard = None
        self._best_step: int | None = None  # of the weights that `load_best_model_at_end` put back
        self._measured: tuple[int, Behaviour] | None = None  # step and answers of the last report with prompts
        if config.agl_enabled:
            check_writable(config)  # before a model is loaded and a dataset prepared
            if peft_config is None:
                check_adapter(model)
            self.align_guard = _InstalledCallback(config, alignment_dataset, protect=protect)
            callbacks = [self.align_guard, *(callbacks or [])]
        else:
            if alignment_dataset is not None or protect is not None:
                warnings.warn(
                    "Protected rows are given, and the configuration switches AGL off: nothing is protected. A `kl_budget` switches it on.",
                    stacklevel=4,
                )
            if config.drift_eval_steps is not None:  # plain training that is watched
                callbacks = [DriftEvalCallback(config), *(callbacks or [])]
        return dict(model=model, args=config, peft_config=peft_config, callbacks=callbacks)

    @classmethod
    def _own_config(cls, model: str | PreTrainedModel | PeftModel, args: TrainingArguments | None) -> Any:
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

    @property
    def statistics(self) -> FisherStatistics | None:
        """Statistics of the alignment rows: from the first step on, or from the start where they were saved."""
        return None if self.align_guard is None else self.align_guard.statistics

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._best_step = None
        if self.align_guard is not None:  # which hears only of the step, not of the folder
            self.align_guard.resume_from = resume_from_checkpoint
        return prepared

    def drift_report(self, prompts: Dataset | None = None, **kwargs: Any) -> DriftReport:
        """
        Measure how far the adapter has moved the model, as it is now.

        Args:
            prompts (`Dataset`, *optional*):
                Prompts to ask base and tuned model, as in [`measure_behaviour`], which `kwargs` go to.

        Raises:
            `ValueError`: If there are no statistics yet, because training has not started, or everything of AGL is off.

        Example:

        ```python
        trainer.train()
        print(trainer.drift_report(prompts=load_prompts("driftcaps", limit=100)).summary())
        ```
        """
        if self.align_guard is None:
            raise ValueError("Everything of AGL is switched off, so that nothing was measured: use `agl-trl drift`.")
        report = self.align_guard.measure(self.model, self.state, self._step_of_weights)
        if prompts is not None:
            layers, tokenizer = self.align_guard.layers, self.align_guard.tokenizer
            assert tokenizer is not None, "checked"
            report.behaviour = measure_behaviour(self.model, tokenizer, prompts, layers=layers, **kwargs)
            self._measured = self._step_of_weights, report.behaviour
        elif self._measured is not None and self._measured[0] == report.global_step:
            report.behaviour = self._measured[1]  # answers of these very weights, so that a push keeps them
        return report

    @property
    def _step_of_weights(self) -> int:
        step = self.state.global_step if self._best_step is None else self._best_step
        guard = self.align_guard
        return step if guard is None or guard.drift_eval is None else guard.drift_eval.step_of(step)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._best_step = self.state.best_global_step
