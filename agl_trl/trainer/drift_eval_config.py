"""Options of the questions that a run asks its own model as it goes."""

from dataclasses import dataclass, field

from ..drift.thresholds import OF_WEIGHTS, Condition


@dataclass(kw_only=True)
class DriftEvalConfig:
    """
    Configuration of [`DriftEvalCallback`], and part of [`AlignGuardConfig`].

    Parameters:
        drift_eval_steps (`int`, *optional*):
            Optimizer steps between two times that the model is asked held-out prompts; `None` asks nothing.
        drift_eval_prompts (`str`, *optional*, defaults to `"driftcaps"`):
            What is asked, by any name that `agl-trl drift --prompts` takes: a set, a file or a dataset on the Hub.
        drift_eval_limit (`int`, *optional*, defaults to `32`):
            Number of prompts, spread evenly over labels and categories; `None` takes all.
        drift_stop (`str`, *optional*):
            Conditions in the grammar of `agl-trl drift --fail-if`, such as `"refusal_drop>0.05"`, several with commas between
            them. Training stops where any is met on these very prompts, or its figure is no number.
        drift_rollback (`bool`, *optional*, defaults to `True`):
            Whether a run that is stopped ends with the weights that passed last, rather than with those that were measured.

    Raises:
        `ValueError`: If a value can't be, or a condition can't be measured by asking.
    """

    drift_eval_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps between two times that the model is asked held-out prompts; `None`: never."
        },
    )
    drift_eval_prompts: str = field(
        default="driftcaps",
        metadata={
            "help": "What is asked, as in `agl-trl drift --prompts`: the name of a set, a file or a dataset on the Hub."
        },
    )
    drift_eval_limit: int | None = field(
        default=32, metadata={"help": "Number of prompts, spread over labels and categories; `None` takes all."}
    )
    drift_stop: str | None = field(
        default=None,
        metadata={
            "help": "Conditions as in `agl-trl drift --fail-if`, such as `refusal_drop>0.05`, with commas between them: training stops "
            "where any is met."
        },
    )
    drift_rollback: bool = field(
        default=True,
        metadata={"help": "Whether a run that is stopped ends with the weights that passed last."},
    )

    def __post_init__(self):
        for name in ("drift_eval_steps", "drift_eval_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.drift_stop is not None and self.drift_eval_steps is None:
            raise ValueError("`drift_stop` needs measurements: set `drift_eval_steps`, the steps between two of them.")
        for condition in self.stop_conditions:
            if condition.figure in OF_WEIGHTS:
                raise ValueError(
                    f"`drift_stop` can't have '{condition}': a run measures its answers, and holds its weights by `drift_budget`."
                )

    @property
    def stop_conditions(self) -> list[Condition]:
        """What ends the run, read."""
        try:
            return [Condition.parse(part) for part in self.drift_stop.split(",")] if self.drift_stop else []
        except ValueError as error:
            raise ValueError(f"`drift_stop`: {error}") from error
