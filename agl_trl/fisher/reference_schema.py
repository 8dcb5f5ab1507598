"""What a file of reference answers must hold, checked value by value before anything is made of it."""

import re
from typing import Any

import torch
from torch import Tensor

from ..artifacts.files import ArtifactError
from ..artifacts.schema import (
    BaseModelDescription,
    Integer,
    Metadata,
    check_metadata,
    check_numbers,
    check_tensor_names,
    short_repr,
)


KIND = re.compile(r"[\w-]{1,60}(/[\w-]{1,60})?")
WIDER = 1e-3  # by which probabilities that were rounded may add up to more than 1


class ReferenceMetadata(Metadata):
    """Metadata of reference answers."""

    base_model: BaseModelDescription
    kinds: list[str]
    pad_token_id: Integer


def check_reference_answers(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """
    Check tensors and metadata of reference answers.

    Raises:
        [`ArtifactError`]: Half a sentence.
    """
    check_metadata(metadata, ReferenceMetadata)
    kinds = metadata["kinds"]
    if not kinds:
        raise ArtifactError("it holds no row")
    for kind in kinds:
        if not KIND.fullmatch(kind):
            raise ArtifactError(f"{short_repr(kind)} is no name of a behaviour")
    check_tensor_names(tensors, {"input_ids", "lengths", "answer_starts", "tokens", "log_probs"})
    lengths, starts = _integers(tensors, "lengths", len(kinds)), _integers(tensors, "answer_starts", len(kinds))
    if (starts < 1).any() or (lengths <= starts).any():
        raise ArtifactError("a row of it has no prompt or no answer")
    _integers(tensors, "input_ids", int(lengths.sum()))
    positions = int((lengths - starts).sum())
    tokens, log_probs = tensors["tokens"], tensors["log_probs"]
    k = tokens.shape[-1] if tokens.dim() == 2 else 0
    if tokens.dtype != torch.int32 or tokens.shape != (positions, k) or k < 1 or (tokens < 0).any():
        raise ArtifactError(
            f"'tokens' is {tokens.dtype} of shape {short_repr([*tokens.shape])} for {positions} tokens of answers"
        )
    check_numbers(log_probs, "log_probs", (positions, k))
    if (log_probs > WIDER).any() or (log_probs.double().exp().sum(1) > 1 + WIDER).any():
        raise ArtifactError("'log_probs' are no log-probabilities")
    if min(metadata["pad_token_id"], 0) < 0:
        raise ArtifactError(f"'pad_token_id' is {metadata['pad_token_id']}, below 0")


def _integers(tensors: dict[str, Tensor], name: str, count: int) -> Tensor:
    """Counts or token ids, as int64."""
    tensor = tensors[name]
    if tensor.dtype != torch.int32 or tensor.shape != (count,) or (tensor < 0).any():
        raise ArtifactError(f"'{name}' is no list of {count} numbers from 0 on")
    return tensor.long()
