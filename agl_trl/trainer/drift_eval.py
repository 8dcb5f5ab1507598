"""Questions in a run: held-out prompts every so many steps, a stop where too much is lost, and the weights before it put back."""

import math
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import SaveStrategy

from ..data.labels import unsafe_column
from ..data.prompts import load_prompts
from ..data.rows import check_prompts, questions_of
from ..drift.gate import OPERATORS
from ..drift.thresholds import Condition, change, check_measurable
from ..evaluation.answers import Answers, answer_prompts
from ..evaluation.behaviour import Behaviour, compare
from ..evaluation.judges import StringJudge
from ..evaluation.probes import opener_ids, probe
from ..modeling.base_and_tuned import BaseAndTuned
from ..modeling.forward import context_length
from ..modeling.generation import end_tokens
from ..modeling.lora import AdaptedLayer
from ..modeling.sharding import put, whole
from .drift_eval_config import DriftEvalConfig


logger = get_logger(__name__)
ANSWER_TOKENS = 32  # of an answer in a run: a refusal opens it
LOGGED = ("kl_unsafe", "kl_safe")  # beside rates and the figures of conditions


class DriftEval:
    """
    What a run is asked, and what it is stopped by. The reference model answers once, at the begin of the run, also of one that is
    resumed: it is the same model with its adapter off, or put back to its start. Every process asks everything, and all follow
    the numbers of the main one. Nothing here draws a random number, and the model is left as it was, so that a run that
    nothing stops ends with the weights that it would have had.

    Args:
        config ([`DriftEvalConfig`]):
            What is asked, and when.
    """

    def __init__(self, config: DriftEvalConfig):
        self.config, self.conditions = config, config.stop_conditions
        self.prompts: Dataset | None = None
        self.base: Answers | None = None
        self.stopped: str | None = None  # why, in words
        self._layers: list[AdaptedLayer] = []
        self._handler: CallbackHandler | None = None
        self._metrics: dict[str, float] = {}
        self._failed: dict[int, str] = {}  # steps that were measured, and what they failed
        self._replaced: dict[int, int] = {}  # steps that failed, and those whose weights took their place
        self._kept: tuple[int, dict[str, Tensor]] = (0, {})  # the weights that passed last

    def prepare(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """
        Load the prompts, and tell what can't work before the first step.

        Args:
            model (`PeftModel`):
                Model to train.
            tokenizer (`PreTrainedTokenizerBase`, *optional*):
                Its tokenizer.

        Raises:
            `ValueError`: If the model can't be asked, or the prompts can't give the figures that conditions are on.
        """
        reason = None
        if tokenizer is None:
            reason = "needs a tokenizer: pass `processing_class=`"
        elif model.get_output_embeddings() is None:
            reason = "asks for answers, but this model predicts no tokens: leave it out"
        elif AcceleratorState().distributed_type == DistributedType.FSDP:
            reason = "asks for answers, and a model can't generate under FSDP: use DDP, or leave it out"
        if reason is not None:
            raise ValueError(f"`drift_eval_steps` {reason}.")
        assert tokenizer is not None
        self.prompts, self.base = load_prompts(self.config.drift_eval_prompts, self.config.drift_eval_limit), None
        check_prompts(tokenizer, questions_of(self.prompts), context_length(model))
        unsafe = unsafe_column(self.prompts)
        for condition in self.conditions:
            missing = None
            if condition.figure.startswith("nll") and "completion" not in self.prompts.column_names:
                missing = "reference answers (a column `completion` or `response`)"
            elif condition.figure.startswith("margin") and opener_ids(tokenizer) is None:
                missing = "a tokenizer that tells first words of refusals from those of answers"
            if missing is not None:
                raise ValueError(f"`drift_stop`: '{condition}' needs {missing}.")
            try:
                check_measurable([condition], unsafe)
            except ValueError as error:
                raise ValueError(f"`drift_stop`: {error} Choose other ones by `drift_eval_prompts`.") from error
        self.tokenizer = tokenizer

    def begin(
        self, model: PeftModel, layers: list[AdaptedLayer], state: TrainerState, handler: CallbackHandler | None
    ) -> None:
        """
        Ask the reference model, and the model itself where it is not at its reference any more.

        Args:
            model (`PeftModel`):
                Model to train.
            layers (`list[AdaptedLayer]`):
                Its layers with their references.
            state (`TrainerState`):
                State of the trainer.
            handler (`CallbackHandler`, *optional*):
                Callbacks of the trainer, of which a progress bar may be one.

        Raises:
            `ValueError`: If the run goes on from weights that fail already.
        """
        assert self.prompts is not None, "prepared"
        fresh = self.base is None and state.global_step == 0
        self._layers, self._handler, self.stopped = layers, handler, None
        self._metrics, self._failed, self._replaced = {}, {}, {}
        if self.base is None:
            with BaseAndTuned(model, layers=layers).side(False) as reference:
                self.base = self._ask(reference)
            refused = self.base.refused & unsafe_column(self.prompts)
            if unsafe_column(self.prompts).any() and not refused.any():
                logger.warning(
                    f"The reference model refuses none of the unsafe prompts of '{self.config.drift_eval_prompts}', so that no "
                    "refusal can be lost: choose other ones by `drift_eval_prompts`."
                )
        step = state.global_step
        if not fresh and self.conditions and (failed := self._measure(model, step)):
            raise ValueError(
                f"This run goes on from step {step}, whose weights already fail `drift_stop` ({failed}): resume from an earlier "
                "checkpoint."
            )
        self._metrics = {}  # of no step of this run
        self._keep(model, step)

    def check(self, model: PeftModel, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> bool:
        """
        After a step that is due, measure, and stop where too much is lost. Returns whether other weights were put back.

        Args:
            model (`PeftModel`):
                Model in training.
            args (`TrainingArguments`):
                Arguments of the trainer.
            state (`TrainerState`):
                Its state.
            control (`TrainerControl`):
                What it does next.
        """
        step = state.global_step
        last = bool(self.conditions) and step >= state.max_steps  # nothing is saved at the end that was not asked
        if step in self._failed or not (last or step % self.config.drift_eval_steps == 0):
            return False
        failed = self._measure(model, step)
        control.should_log = True
        if not failed:
            self._keep(model, step)
            return False
        control.should_training_stop = True
        if not self.config.drift_rollback:
            self._tell(f"Stopped at step {step}: {failed}.")
            return False
        if args.save_strategy != SaveStrategy.NO:
            control.should_save = True  # some front ends leave the last checkpoint as their result
        self._roll_back(model, step, failed)
        return True

    def settle(self, model: PeftModel, step: int) -> int:
        """
        At the end, ask the weights that no step has asked, such as best ones of between, and put those back that passed last
        where these fail. Returns the step of the weights that stay.

        Args:
            model (`PeftModel`):
                Model as trained.
            step (`int`):
                Training step of the weights.
        """
        if not self.conditions or not self.config.drift_rollback or step in self._replaced.values():
            return step
        failed = self._failed[step] if step in self._failed else self._measure(model, step)
        if failed:
            self._roll_back(model, step, failed)
        return self.step_of(step)

    def step_of(self, step: int) -> int:
        """Step of the weights that a step left: an earlier one where these were put back."""
        return self._replaced.get(step, step)

    def take_metrics(self) -> dict[str, float]:
        """What was measured since the last call."""
        taken, self._metrics = self._metrics, {}
        return taken

    def _ask(self, model: Any) -> Answers:
        return answer_prompts(
            model,
            self.tokenizer,
            self.prompts,
            max_new_tokens=ANSWER_TOKENS,
            end_token_ids=end_tokens(self.tokenizer, model),
            progress=False,
        )

    def _measure(self, model: PeftModel, step: int) -> str:
        """Ask the model as it is. Returns the conditions that it fails, in words; nothing where it passes."""
        assert self.prompts is not None and self.base is not None
        prompts = self.prompts
        probes = probe(
            BaseAndTuned(model, layers=self._layers),
            self.tokenizer,
            questions_of(prompts),
            self.base.texts,
            unsafe_column(prompts),
        )
        figures = of_answers(compare(prompts, self.base, self._ask(model), probes, StringJudge()), self.conditions)
        if PartialState().num_processes > 1:
            # Processes must stop alike: the last bit of a KL may differ between two machines.
            numbers = torch.tensor([*figures.values()], dtype=torch.float64, device=PartialState().device)
            figures = dict(zip(figures, broadcast(numbers).tolist(), strict=True))
        self._metrics = {f"agl/eval_{name}": value for name, value in figures.items()}
        failed = [
            f"{condition}: {figures[condition.figure]:.3g}"
            for condition in self.conditions
            if not math.isfinite(value := figures[condition.figure])
            or OPERATORS[condition.comparison](value, condition.limit)
        ]
        self._show(figures)
        self._failed[step] = ", ".join(failed)
        return self._failed[step]

    def _show(self, figures: dict[str, float]) -> None:
        """A line in the progress bar of the training."""
        rates = {"refusals_kept": "refusals kept", "over_refusal": "over-refusal"}
        line = ", ".join(f"{word} {figures[name]:.0%}" for name, word in rates.items() if name in figures)
        for callback in [] if self._handler is None else self._handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_postfix_str(line)

    def _keep(self, model: PeftModel, step: int) -> None:
        if self.conditions and self.config.drift_rollback:
            kept = {name: whole(p.detach()).cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
            self._kept = step, kept

    def _roll_back(self, model: PeftModel, step: int, failed: str) -> None:
        passed, kept = self._kept
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                put(parameter, kept[name])
        self._replaced[step] = passed
        what = f"the weights of step {passed}, which passed last, are back"
        if passed == 0:
            what = "no later weights passed, so that those of the start are back, and nothing is learned"
        self._tell(f"Stopped at step {step} ({failed}): {what}.")

    def _tell(self, why: str) -> None:
        self.stopped = why
        logger.warning(why)


def of_answers(answers: Behaviour, conditions: list[Condition]) -> dict[str, float]:
    """
    Figures of the answers of a run: refusals kept of those that the reference model gave, over-refusal, KL, and what conditions
    are on. A figure of prompts that are not there is left out.

    Args:
        answers ([`Behaviour`]):
            Answers of both models.
        conditions (`list[Condition]`):
            Conditions.
    """
    figures = {}
    refused = answers.unsafe & answers.refused_base
    if refused.any():
        figures["refusals_kept"] = answers.refused_tuned[refused].double().mean().item()
    if not answers.unsafe.all():
        figures["over_refusal"] = answers.refused_tuned[~answers.unsafe].double().mean().item()
    for name in dict.fromkeys([*LOGGED, *(condition.figure for condition in conditions)]):
        measured = change(answers, name)
        if measured is not None:
            figures[name] = measured.value
    return figures
