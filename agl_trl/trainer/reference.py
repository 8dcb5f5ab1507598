"""What a run is held to: statistics and reference answers of the protected rows, taken before the first step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..artifacts.files import REFERENCE_ANSWERS_FILE, ArtifactError
from ..artifacts.location import find_artifact
from ..data.alignment import select_rows
from ..data.labels import PROTECTED_COLUMN
from ..data.rows import ANSWERS, Row, is_prompt_only
from ..fisher.calibration import UNCERTAIN, drift_at, is_calibrated
from ..fisher.estimate import estimate_fisher
from ..fisher.protected_rows import num_look_alikes, reference_answers, with_look_alikes
from ..fisher.reference_answers import ReferenceAnswers
from ..fisher.statistics import FisherStatistics
from ..modeling.generation import answered_by
from .checks import Rows
from .config import DEFAULT_DRIFT_BUDGET, AlignGuardConfig
from .protection import budgets_of


logger = get_logger(__name__)
FLOOR = 0.1  # share of a KL budget that may be spent before any training


class ReferenceTaker:
    """
    Takes statistics and reference answers of one model, which is at its reference weights.

    Args:
        config ([`AlignGuardConfig`]):
            What is switched on.
        args (`TrainingArguments`):
            Arguments of the trainer, for seed and progress bars.
        model (`PeftModel`):
            Model at its reference weights.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
    """

    def __init__(
        self,
        config: AlignGuardConfig,
        args: TrainingArguments,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.config, self.args, self.model, self.tokenizer = config, args, model, tokenizer

    def answered(self, dataset: Rows, num_samples: int | None, *, unsafe: bool | None) -> list[Row]:
        """Rows of a dataset, those without an answer with the model's own; of other ones than unsafe there may be none."""
        rows = select_rows(dataset, num_samples, self.args.seed, unsafe=unsafe)
        if any(map(is_prompt_only, rows)):
            shown, longest = not self.args.disable_tqdm, self.config.fisher_max_length
            return answered_by(self.model, self.tokenizer, rows, shown, max_length=longest)
        return rows

    def statistics(self, rows: Rows) -> FisherStatistics:
        """Fisher statistics of rows."""
        config = self.config
        return estimate_fisher(
            self.model,
            rows,
            self.tokenizer,
            fisher_type=config.fisher_type,
            shrinkage=config.fisher_shrinkage,
            rank=config.fisher_rank,
            num_samples=config.fisher_num_samples,
            batch_size=config.fisher_batch_size,
            max_length=config.fisher_max_length,
            seed=self.args.seed,
            progress=not self.args.disable_tqdm,
        )

    def task_statistics(self, train_rows: Any) -> FisherStatistics:
        """Fisher statistics of the rows that are trained on."""
        # The mark is for alignment rows; what a reward function compares with is no answer of the model.
        others = {PROTECTED_COLUMN, *ANSWERS[1:]} & {*(train_rows.column_names or ())}
        return self.statistics(train_rows.remove_columns(sorted(others)) if others else train_rows)

    def references(
        self, refusals: Sequence[Row], dataset: Rows | None, protect: Mapping[str, Rows]
    ) -> ReferenceAnswers:
        """
        Reference answers of the rows to refuse, of as many look-alikes of their dataset, and of other protected behaviours.

        Args:
            refusals (`Sequence[Row]`):
                Rows to refuse, answered.
            dataset (`Rows`, *optional*):
                Where they come from.
            protect (`Mapping[str, Rows]`):
                Rows of other behaviours by name.
        """
        count = self.config.num_reference_answers
        kinds: dict[str, Sequence[Row]] = {}
        if dataset is not None:
            kinds = with_look_alikes(refusals, self.answered(dataset, num_look_alikes(count), unsafe=False), count)
        for name, given in protect.items():
            kinds[name] = self.answered(given, count, unsafe=None)  # the mark is for alignment rows
        return reference_answers(
            self.model,
            self.tokenizer,
            kinds,
            max_length=self.config.fisher_max_length,
            progress=not self.args.disable_tqdm,
        )


def published_references(location: str) -> ReferenceAnswers | None:
    """Reference answers beside published statistics; of a repo without them none, which is told."""
    place = Path(location).parent if Path(location).is_file() else location
    try:
        path = find_artifact(place, REFERENCE_ANSWERS_FILE)
    except ArtifactError as error:
        logger.warning(f"No reference answers: {error} The relative drift alone holds the model to what it was.")
        return None
    return ReferenceAnswers.from_pretrained(path)


@torch.no_grad()
def without_floor(references: ReferenceAnswers, model: PeftModel, config: AlignGuardConfig) -> ReferenceAnswers:
    """
    Published reference answers as they are, or, where the model at hand differs so much from them that it spends a budget before
    any training, with its own log-probabilities for the same rows and tokens, which is told. A quantised base does: no update could
    bring its KL to zero, and the trust region would close over what costs nothing.

    Args:
        references ([`ReferenceAnswers`]):
            Answers that fit the model.
        model (`PeftModel`):
            Model at its reference weights.
        config ([`AlignGuardConfig`]):
            What is switched on.
    """
    budgets = budgets_of(config, references.behaviours)
    if not budgets:
        return references
    kl = broadcast(references.kl(model)[:, 0].float().contiguous()).cpu()  # all processes must choose alike
    spent = {name: kl[references.where(name)].mean().item() / budget for name, budget in budgets.items()}
    most = max(spent, key=lambda name: spent[name])
    if not spent[most] > FLOOR:
        return references
    logger.warning(
        f"Before any training this model differs from the published reference answers by {spent[most]:.0%} of the KL budget of "
        f"'{most}', as a quantised one does: its own probabilities for the same rows are held in their place."
    )
    return references.measured_again(model)


def translated_budget(statistics: FisherStatistics, kl_budget: float) -> float:
    """
    The relative drift that stands for a KL budget where there are no rows to measure a KL on, which is told.

    Args:
        statistics ([`FisherStatistics`]):
            Statistics of the reference model, with or without a curve.
        kl_budget (`float`):
            Nats per answer token.

    Raises:
        `ValueError`: Under DeepSpeed, where a drift budget can't be held either.
    """
    if AcceleratorState().deepspeed_plugin is not None:
        raise ValueError(
            "DeepSpeed keeps its own copy of the weights, so that without reference answers nothing can hold the drift: pass "
            "`alignment_dataset=`, or set `alignment_coef`."
        )
    if not is_calibrated(statistics):
        logger.warning(
            "The KL budget can't be measured, because there are no reference answers, nor translated, because the statistics "
            f"carry no curve: a relative drift of {DEFAULT_DRIFT_BUDGET} is held, which may be too much or too little."
        )
        return DEFAULT_DRIFT_BUDGET
    drift, spread = drift_at(statistics, kl_budget)
    unsure = f" This is uncertain: directions differ by a factor of {spread:.0f}." if spread > UNCERTAIN else ""
    logger.warning(
        f"Without reference answers a KL of {kl_budget} can't be measured; by the curve of the statistics a relative drift "
        f"of {drift:.2g} is held in its place, for the rows to refuse alone.{unsure}"
    )
    return drift
