"""What of AlignGuard-LoRA is switched on: for the callback by itself, and part of the arguments of every AGL trainer."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..fisher.protected_rows import DEFAULT_KL_BUDGET, NUM_REFERENCE_ANSWERS
from ..objective.alignguard import TaskMetric, TaskSubspace
from .drift_eval_config import DriftEvalConfig
from .fisher_config import FisherConfig


Variant = Literal["kfac", "paper"]
DEFAULT_ANCHOR_COEF = 0.6  # under a KL budget
DEFAULT_DRIFT_BUDGET = 3e-3  # of statistics that carry no curve to translate a KL budget by


@dataclass
class AlignGuardConfig(FisherConfig, DriftEvalConfig):
    """
    Configuration of [`AlignGuardCallback`], and what the AGL trainers add to the arguments of TRL's. Symbols are those of
    AlignGuard-LoRA (https://huggingface.co/papers/2508.02079). It also has the options of [`FisherConfig`],
    for the statistics, and of [`DriftEvalConfig`], by which a run asks its model held-out prompts, and stops.

    Parameters:
        alignment_coef (`float`, *optional*):
            Weight λ_A of the alignment penalty: mean over the adapted layers of ‖ΔW_A‖²_F / ‖W‖²_F in the Fisher metric of the
            alignment rows. With `task_coef` unset the complete form ‖ΔW‖²_F is penalised. `None` leaves it to the budget to hold the
            drift. `0.0`, with no budget, anchor or other coefficient, switches AGL off; the trainer is then exactly its TRL
            parent.
        task_coef (`float`, *optional*):
            Weight λ_T of the task stability. `None` takes `alignment_coef`.
        task_metric (`str`, *optional*, defaults to `"rest"`):
            Metric H of the task stability: `"rest"` of the same Fisher, `"identity"` or the `"task"`'s own Fisher.
        task_subspace (`str`, *optional*):
            What counts as the task part ΔW_T: the `"complement"` of the alignment-critical subspace, or the critical subspace of
            the `"task"`'s own Fisher. `None` takes `"task"` where the geodesic separation has a weight (it is identically zero
            under the complement), `"complement"` otherwise.
        collision_coef (`float`, *optional*, defaults to `0.0`):
            Weight λ_NC of the collision terms.
        collision_alpha (`float`, *optional*, defaults to `0.5`):
            Share α of the Riemannian overlap in the collision terms; the rest is geodesic separation.
        collision_beta (`float`, *optional*, defaults to `4.0`):
            β of the Riemannian overlap.
        collision_threshold (`float`, *optional*, defaults to `1.0`):
            τ of the Riemannian overlap, in units of the root mean square of the layer's weight.
        collision_width (`float`, *optional*, defaults to `0.25`):
            Width T of its sigmoid, in the same units.
        collision_rows (`int`, *optional*):
            Rows of every layer sampled per step for the Riemannian overlap; `None` takes all.
        variant (`str`, *optional*, defaults to `"kfac"`):
            `"kfac"` is the form described here; `"paper"` the published one with its published constants, as far as known.
        kl_budget (`float`, *optional*):
            Largest KL to the reference model on the protected rows that the adapter may end with, in nats per answer token (a row
            counts half by its first five tokens). While training, a few rows are projected back to half of it every
            `anchor_every` steps; at the end all are measured, and the update is shrunk until it holds. `None` takes 0.02, or none
            where a `drift_budget`, an `alignment_coef` or an `anchor_coef` is given. Without protected rows (statistics of a repo
            that publishes no reference answers) it is translated into a `drift_budget` by the curve that the statistics carry.
        kl_budgets (`dict[str, float]`, *optional*):
            Other budgets for single behaviours by their names in `protect`; also as JSON.
        drift_budget (`float`, *optional*):
            Largest mean relative drift the adapter may reach; kept after every step (of a continued adapter, which can't be scaled
            back to its start within its rank, by the multiplier alone and so not exactly).
        anchor_coef (`float`, *optional*):
            Weight of the KL to the reference model on protected rows, whose gradient is at most as long as that of all else. `None`
            takes 0.6 under a `kl_budget`, and 0 otherwise.
        trust_radius (`float`, *optional*, defaults to `2.0`):
            Under a `kl_budget`, the relative drift is kept after every step at or below where the KL is expected to be this many times
            the budget: what protected inputs excite is taken back, the rest of the step stays. `None` leaves it free.
        anchor_every (`int`, *optional*, defaults to `2`):
            Optimizer steps between two anchored ones.
        anchor_batch_size (`int`, *optional*, defaults to `4`):
            Protected rows of every behaviour per anchored step.
        num_reference_answers (`int`, *optional*, defaults to `128`):
            Number of protected rows per behaviour, half of them to refuse where there are others; `None` takes all.
        push_reference_answers (`bool`, *optional*, defaults to `True`):
            Whether the reference answers (tokens of the protected rows) are pushed to the Hub with the statistics.
        fisher_energy (`float`, *optional*, defaults to `0.9`):
            Share of the trace of the Fisher that spans the critical subspaces.

    Example:

    ```python
    from agl_trl import AlignGuardCallback, AlignGuardConfig

    config = AlignGuardConfig(kl_budget=0.01)
    trainer = Trainer(..., callbacks=[AlignGuardCallback(config, alignment_dataset=rows, processing_class=tokenizer)])
    ```
    """

    alignment_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight lambda_A of the alignment penalty: mean over the adapted layers of |dW_A|^2 / |W|^2 in the Fisher "
            "metric of the alignment rows. With `task_coef` unset the complete form |dW|^2 is penalised. `None` leaves it to the "
            "budget to hold the drift. `0.0`, with no budget, anchor or other coefficient, switches AGL off; the "
            "trainer is then exactly its TRL parent."
        },
    )
    task_coef: float | None = field(
        default=None, metadata={"help": "Weight lambda_T of the task stability. `None` takes `alignment_coef`."}
    )
    task_metric: TaskMetric = field(
        default="rest",
        metadata={
            "help": "Metric H of the task stability: the `rest` of the same Fisher, `identity` or the `task`'s own Fisher."
        },
    )
    task_subspace: TaskSubspace | None = field(
        default=None,
        metadata={
            "help": "What counts as the task part dW_T: the `complement` of the alignment-critical subspace, or the critical "
            "subspace of the `task`'s own Fisher. `None` takes `task` where the geodesic separation has a weight (it is "
            "identically zero under the complement), `complement` otherwise."
        },
    )
    collision_coef: float = field(default=0.0, metadata={"help": "Weight lambda_NC of the collision terms."})
    collision_alpha: float = field(
        default=0.5,
        metadata={
            "help": "Share alpha of the Riemannian overlap in the collision terms; the rest is geodesic separation."
        },
    )
    collision_beta: float = field(default=4.0, metadata={"help": "beta of the Riemannian overlap."})
    collision_threshold: float = field(
        default=1.0,
        metadata={"help": "tau of the Riemannian overlap, in units of the root mean square of the layer's weight."},
    )
    collision_width: float = field(default=0.25, metadata={"help": "Width T of its sigmoid, in the same units."})
    collision_rows: int | None = field(
        default=None,
        metadata={"help": "Rows of every layer sampled per step for the Riemannian overlap; `None` takes all."},
    )
    variant: Variant = field(
        default="kfac",
        metadata={
            "help": "`kfac` is the form described here; `paper` the published one with its published constants, as far as known."
        },
    )
    kl_budget: float | None = field(
        default=None,
        metadata={
            "help": "Largest KL to the reference model on the protected rows that the adapter may end with, in nats per answer "
            "token. `None` takes 0.02, or none where a `drift_budget`, an `alignment_coef` or an `anchor_coef` is given."
        },
    )
    kl_budgets: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": "Other budgets for single behaviours by their names in `protect`, as JSON."},
    )
    drift_budget: float | None = field(
        default=None,
        metadata={
            "help": "Largest mean relative drift the adapter may reach; kept after every step (of a continued adapter by the "
            "multiplier alone, and so not exactly)."
        },
    )
    anchor_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the KL to the reference model on protected rows. `None` takes 0.6 under a `kl_budget`, and 0 otherwise."
        },
    )
    trust_radius: float | None = field(
        default=2.0,
        metadata={
            "help": "Under a `kl_budget`, the drift is kept after every step where the KL is expected to be at most this many times the "
            "budget. `None` leaves it free."
        },
    )
    anchor_every: int = field(default=2, metadata={"help": "Optimizer steps between two anchored ones."})
    anchor_batch_size: int = field(
        default=4, metadata={"help": "Protected rows of every behaviour per anchored step."}
    )
    num_reference_answers: int | None = field(
        default=NUM_REFERENCE_ANSWERS,
        metadata={
            "help": "Number of protected rows per behaviour, half of them to refuse where there are others; `None` takes all."
        },
    )
    push_reference_answers: bool = field(
        default=True,
        metadata={"help": "Whether the reference answers (tokens of the protected rows) are pushed to the Hub."},
    )
    fisher_energy: float = field(
        default=0.9, metadata={"help": "Share of the trace of the Fisher that spans the critical subspaces."}
    )

    def __post_init__(self):
        DriftEvalConfig.__post_init__(self)
        FisherConfig.__post_init__(self)
        if self.kl_budgets is not None:
            self.kl_budgets = _read_budgets(self.kl_budgets)
        if self.alignment_coef is None:
            self.alignment_coef = 0.0
            given = (self.drift_budget, self.kl_budget, self.anchor_coef)
            if given == (None, None, None) and self.variant != "paper":
                self.kl_budget = DEFAULT_KL_BUDGET
        if self.anchor_coef is None:
            self.anchor_coef = 0.0 if self.kl_budget is None else DEFAULT_ANCHOR_COEF
        for name in ("alignment_coef", "task_coef", "collision_coef", "anchor_coef"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")
        for name in ("fisher_energy", "collision_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {getattr(self, name)}.")
        for name in ("collision_rows", "anchor_every", "anchor_batch_size", "num_reference_answers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for name in ("kl_budget", "drift_budget", "trust_radius", "collision_width"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be above 0, got {value}.")
        if self.kl_budgets and self.kl_budget is None:
            raise ValueError(
                "`kl_budgets` gives single behaviours another budget than the `kl_budget` of all: set it too."
            )
        for name, value in (self.kl_budgets or {}).items():
            if not value > 0:
                raise ValueError(f"`kl_budgets` must be above 0, got {value} for '{name}'.")
        for name, choices in (
            ("task_metric", get_args(TaskMetric)),
            ("task_subspace", (None, *get_args(TaskSubspace))),
            ("variant", get_args(Variant)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        if self.task_subspace is None:
            self.task_subspace = "task" if self.collision_coef > 0 and self.collision_alpha < 1 else "complement"
        if self.variant == "paper":  # its projector comes from the raw output side of the empirical Fisher
            self.fisher_type, self.fisher_shrinkage = "empirical", 0.0

    @property
    def agl_enabled(self) -> bool:
        """Whether anything of AGL is on; if not, an AGL trainer is its TRL parent."""
        coefficients = (self.alignment_coef, self.task_coef, self.collision_coef, self.anchor_coef)
        budgets = (self.kl_budget, self.drift_budget)
        return any(coefficients) or budgets != (None, None) or self.variant == "paper"

    @property
    def anchored(self) -> bool:
        """Whether the run asks the model for its answers to protected rows."""
        return self.kl_budget is not None or bool(self.anchor_coef)


def _read_budgets(given: dict[str, float] | str) -> dict[str, float]:
    budgets: Any = given
    if isinstance(given, str):
        try:
            budgets = json.loads(given)
        except ValueError:
            budgets = None
    numbers = budgets.values() if isinstance(budgets, dict) else [None]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers):
        raise ValueError(f"`kl_budgets` must be JSON such as '{{\"text\": 0.01}}', got {given!r}.")
    return budgets
