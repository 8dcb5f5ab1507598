"""What a run guards: a LoRA adapter with its statistics, reference answers and limits, checked and made before the first step."""

from typing import Any

from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerState, TrainingArguments

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
from .evidence import drift_of
from .protection import Protection
from .reference import ReferenceTaker, published_references, translated_budget, without_floor
from .regularizer import Regularizer, coefficients_of
from .resume import CheckpointState, started


logger = get_logger(__name__)


class Guard:
    """
    The adapter of one trainer, and all that holds it; [`AlignGuardCallback`] says when what happens.

    Args:
        config ([`AlignGuardConfig`]):
            What is switched on.
        alignment_dataset (`Dataset`, `IterableDataset` or `Sequence[dict]`, *optional*):
            Rows whose behaviour must not change.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer of the model; by default the trainer's.
        protect (`dict`, *optional*):
            Rows of other behaviours by name.

    Raises:
        `ValueError`: If the configuration switches AGL off.
    """

    def __init__(
        self,
        config: AlignGuardConfig,
        alignment_dataset: Rows | None,
        processing_class: PreTrainedTokenizerBase | None,
        protect: dict[str, Rows] | None,
    ):
        self.config = config
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
        self._held: int | None = None  # step of the weights that hold the KL budget
        self._deepspeed = False

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
        self.layers = started(adapted_layers(model))
        if not self.layers:
            raise ValueError("The adapter has no LoRA layer that AGL could guard.")
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

    def build(self, args: TrainingArguments, model: PeftModel, train_rows: Any, begun: CheckpointState) -> None:
        """Build what every step needs; the model is at its reference weights, or the run is resumed."""
        config, task_statistics = self.config, None
        published = self.references is not None and begun.references is None
        with at_reference(model, self.layers):  # also when the run is resumed
            anchored = self._anchored(model) and self._has_rows
            if self.tokenizer is not None:
                taker = ReferenceTaker(config, args, model, self.tokenizer)
                dataset, protect = self._unanswered(begun)
                if self.statistics is None or (anchored and (dataset is not None or protect)):
                    self._take(taker, anchored, dataset, protect)
                if config.variant == "kfac" and coefficients_of(config).needs_task_fisher:
                    task_statistics = taker.task_statistics(train_rows)
            assert self.statistics is not None, "checked"
            if self.references is not None:
                self.references.check_fits(model)
                if published:
                    self.references = without_floor(self.references, model, config)
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

    def _unanswered(self, begun: CheckpointState) -> tuple[Rows | None, dict[str, Rows]]:
        """Alignment rows and other ones that have no reference answers yet; those of a checkpoint are not taken again."""
        there = [] if self.references is None else self.references.behaviours
        kept = [] if begun.references is None else begun.references.behaviours
        others = {name: rows for name, rows in self.protect.items() if name not in kept}
        return None if ALIGNMENT in there else self.alignment_dataset, others

    def _num_refusals(self, anchored: bool) -> int | None:
        """As many rows to refuse as statistics or reference answers take, whichever are more; the statistics draw theirs from these."""
        read, kept = self.config.fisher_num_samples, self.config.num_reference_answers
        if not anchored:
            return read
        return None if read is None or kept is None else max(read, kept)

    def _take(self, taker: ReferenceTaker, anchored: bool, dataset: Rows | None, protect: dict[str, Rows]) -> None:
        """Statistics and reference answers of rows of this run, which are chosen and answered once."""
        refusals = []
        if dataset is not None:
            refusals = taker.answered(dataset, self._num_refusals(anchored), unsafe=True)
        if self.statistics is None:
            self.statistics = taker.statistics(refusals)
        if anchored:
            own = taker.references(refusals, dataset, protect)
            self.references = own if self.references is None else self.references.joined(own)

    def _drift_budget(self) -> float | None:
        """The limit on the relative drift: the given one, or what a KL budget comes to where there are no rows to measure it on."""
        config = self.config
        measurable = self.references is not None and ALIGNMENT in self.references.behaviours
        if config.kl_budget is None or config.drift_budget is not None or measurable:
            return config.drift_budget
        assert self.statistics is not None, "there by now"
        return translated_budget(self.statistics, config.kl_budget)

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
