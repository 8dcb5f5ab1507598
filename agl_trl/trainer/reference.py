"""What a run is held to: statistics and reference answers of the protected rows, taken before the first step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..artifacts.files import REFERENCE_ANSWERS_FILE, ArtifactError, find_artifact
from ..data.alignment import select_rows
from ..data.labels import PROTECTED_COLUMN
from ..data.rows import ANSWERS, Row, is_prompt_only
from ..fisher.estimate import estimate_fisher
from ..fisher.protected_rows import num_look_alikes, reference_answers, with_look_alikes
from ..fisher.reference_answers import ReferenceAnswers
from ..fisher.statistics import FisherStatistics
from ..modeling.generation import answered_by
from .checks import Rows
from .config import AlignGuardConfig


logger = get_logger(__name__)


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

    def answered(self, dataset: Rows, num_samples: int | None, *, unsafe: bool) -> list[Row]:
        """Rows of a dataset, those without an answer with the model's own; of other ones than unsafe there may be none."""
        rows = select_rows(dataset, num_samples, self.args.seed, unsafe=unsafe)
        if any(map(is_prompt_only, rows)):
            return answered_by(self.model, self.tokenizer, rows, not self.args.disable_tqdm)
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
            kinds[name] = self.answered(given, count, unsafe=True)
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
