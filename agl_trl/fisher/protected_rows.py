"""Which rows stand for the behaviour that is to stay, and the reference answers to them."""

from collections.abc import Mapping, Sequence

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.alignment import AlignmentRow, tokenize_rows
from ..data.rows import Row
from ..modeling.forward import context_length
from .reference_answers import ReferenceAnswers


ALIGNMENT = "alignment"  # the behaviour that the alignment rows stand for
REFUSE, COMPLY = f"{ALIGNMENT}/refuse", f"{ALIGNMENT}/comply"
DEFAULT_KL_BUDGET = 0.02  # nats per answer token
NUM_REFERENCE_ANSWERS = 128  # per behaviour


def with_look_alikes(refusals: Sequence[Row], others: Sequence[Row], count: int | None) -> dict[str, Sequence[Row]]:
    """
    Alignment rows by kind: those to refuse, and the others.

    Args:
        refusals (`Sequence[Row]`):
            Rows to refuse, answered.
        others (`Sequence[Row]`):
            At most half as many as wanted of those that only look like them, answered; there may be none.
        count (`int`, *optional*):
            How many are wanted; `None` takes all.
    """
    return {REFUSE: refusals[: None if count is None else count - len(others)], COMPLY: others}


def num_look_alikes(count: int | None) -> int | None:
    """How many of so many rows are look-alikes, where there are enough."""
    return None if count is None else count // 2


def reference_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    kinds: Mapping[str, Sequence[Row]],
    *,
    max_length: int | None,
    progress: bool = True,
) -> ReferenceAnswers:
    """
    Reference answers of rows.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Model at its reference weights.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        kinds (`Mapping[str, Sequence[Row]]`):
            Rows with their answers, by the behaviour and kind that they stand for.
        max_length (`int`, *optional*):
            Longer rows lose their end.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a bar.
    """
    rows: list[AlignmentRow] = []
    names: list[str] = []
    for kind, of_kind in kinds.items():
        rows += tokenize_rows(of_kind, tokenizer, max_length, context_length(model))
        names += [kind] * len(of_kind)
    return ReferenceAnswers.measure(model, tokenizer, rows, names, progress=progress)
