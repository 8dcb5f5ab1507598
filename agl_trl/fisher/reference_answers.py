"""Reference answers: what the aligned model says on protected rows, token by token, so that others can hold to it."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..artifacts.files import FOLDER, REFERENCE_ANSWERS_FILE, ArtifactError, save_tensors
from ..artifacts.location import find_artifact
from ..artifacts.schema import read_artifact
from ..artifacts.upload import PushToHubMixin
from ..data.alignment import AlignmentRow, batches, pad_token_id
from ..modeling.forward import answer_logits, context_length, evaluating, input_device, recomputing
from ..objective.kl import FIRST_TOKENS, kl_of_row, top_k_kl
from .reference_schema import check_reference_answers
from .statistics import check_same_base, describe_base


TOP_K = 32
BATCH_SIZE = 8
BATCH_TOKENS = (
    2048  # of a batch of eight: the logits of 8 rows of 1,024 tokens are 2.5 GB in bfloat16, with 150,000 words
)
LARGEST_START = 0.1  # nats per token by which a reference model may differ from its own answers: a quantised one does


@dataclass
class ReferenceAnswers(PushToHubMixin):
    """
    Answers of an aligned model to protected rows: their tokens, and for every token of an answer the k = 32 most likely next
    tokens with their log-probabilities. What is measured against them is a KL divergence ([`top_k_kl`]); there is no second model.

    Args:
        rows (`list[AlignmentRow]`):
            Tokens of the protected rows.
        kinds (`list[str]`):
            Of every row the behaviour it stands for, and after a slash its kind where it has one, such as `"alignment/refuse"`.
        tokens (`list[Tensor]`):
            Of every row the most likely next tokens, of shape `(answer tokens, k)`, int32.
        log_probs (`list[Tensor]`):
            Their log-probabilities, of the same shape, float32.
        metadata (`dict`):
            Base model and padding token: JSON-serialisable.

    Example:

    ```python
    references = ReferenceAnswers.from_pretrained("acme/assistant-statistics")
    print(references.kl(model).mean())  # nats per answer token
    ```
    """

    rows: list[AlignmentRow]
    kinds: list[str]
    tokens: list[Tensor]
    log_probs: list[Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def measure(
        cls,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[AlignmentRow],
        kinds: list[str],
        *,
        progress: bool = True,
    ) -> Self:
        """
        Take the reference log-probabilities of a model at its reference weights, which is left as it was.

        Args:
            model (`PreTrainedModel` or `PeftModel`):
                Reference model.
            tokenizer (`PreTrainedTokenizerBase`):
                Its tokenizer, for the padding.
            rows (`list[AlignmentRow]`):
                Tokenized rows.
            kinds (`list[str]`):
                Their behaviours and kinds.
            progress (`bool`, *optional*, defaults to `True`):
                Whether to show a bar.
        """
        pad = pad_token_id(tokenizer)
        tokens, log_probs = [torch.empty(0)] * len(rows), [torch.empty(0)] * len(rows)
        bar = tqdm(total=len(rows), desc="Reference answers", unit="row", disable=not progress)
        with bar, evaluating(model):
            for index, row in _log_probs(model, rows, pad):
                top = row.topk(min(TOP_K, row.shape[-1]))
                tokens[index], log_probs[index] = top.indices.int().cpu(), top.values.cpu()
                bar.update()
        return cls(rows, kinds, tokens, log_probs, {"base_model": describe_base(model), "pad_token_id": pad})

    @torch.no_grad()
    def measured_again(self, model: PreTrainedModel | PeftModel) -> Self:
        """
        These rows and tokens with the log-probabilities that another model of the same structure gives them, such as a quantised one.

        Args:
            model (`PreTrainedModel` or `PeftModel`):
                Model at its reference weights, left as it was.
        """
        log_probs = [torch.empty(0)] * len(self.rows)
        with evaluating(model):
            for index, row in _log_probs(model, self.rows, self.metadata["pad_token_id"]):
                log_probs[index] = row.gather(1, self.tokens[index].to(row.device, torch.int64)).cpu()
        return replace(self, log_probs=log_probs)

    @property
    def behaviours(self) -> list[str]:
        """Names of the protected behaviours, in the order of the rows."""
        return list(dict.fromkeys(kind.split("/")[0] for kind in self.kinds))

    def where(self, kind: str) -> list[int]:
        """Numbers of the rows of a behaviour, or of one of its kinds."""
        return [i for i, own in enumerate(self.kinds) if own == kind or own.split("/")[0] == kind]

    def joined(self, other: Self) -> Self:
        """These answers and others of the same model, which stand in the place of behaviours of their name."""
        kept = [i for i, kind in enumerate(self.kinds) if kind.split("/")[0] not in other.behaviours]
        k = min(part.shape[1] for part in (*self.tokens, *other.tokens))
        return type(self)(
            [*(self.rows[i] for i in kept), *other.rows],
            [*(self.kinds[i] for i in kept), *other.kinds],
            [part[:, :k] for part in (*(self.tokens[i] for i in kept), *other.tokens)],
            [part[:, :k] for part in (*(self.log_probs[i] for i in kept), *other.log_probs)],
            self.metadata,
        )

    def kl(self, model: PreTrainedModel | PeftModel, indices: Sequence[int] | None = None) -> Tensor:
        """
        KL of the model as it is now to the reference on some rows, in one batch, with a graph where gradients are on.

        Args:
            model (`PreTrainedModel` or `PeftModel`):
                Model, measured in eval mode and left as it was.
            indices (`Sequence[int]`, *optional*):
                Numbers of the rows; by default all, in batches of up to eight.

        Returns:
            `Tensor`:
                Nats per answer token, of shape `(rows, 2)`: as the budget has it ([`kl_of_row`]), and of the first five tokens alone.
        """
        if indices is None:
            together = _together(self.rows, range(len(self.rows)))
            every = torch.cat([self.kl(model, part) for part in together])
            return every[torch.tensor([i for part in together for i in part], device=every.device).argsort()]
        chosen = [self.rows[i] for i in indices]
        (batch,) = batches(chosen, len(chosen), self.metadata["pad_token_id"], input_device(model))
        with evaluating(model), recomputing(model) if torch.is_grad_enabled() else nullcontext():
            logits, mask = answer_logits(model, batch)
        found: list[Tensor] = [logits.new_empty(0)] * len(chosen)
        for line, position in enumerate(batch.indices):
            tokens, log_probs = self.tokens[indices[position]], self.log_probs[indices[position]]
            tuned = logits[line, mask[line]].float().log_softmax(-1)
            per_token = top_k_kl(tokens.to(tuned.device, torch.int64), log_probs.to(tuned.device), tuned)
            found[position] = torch.stack([kl_of_row(per_token), per_token[:FIRST_TOKENS].mean()])
        return torch.stack(found)

    def check_fits(self, model: PreTrainedModel | PeftModel) -> None:
        """
        Check that the answers are of this model, which is at its reference weights.

        Raises:
            [`ArtifactError`]: If it has another structure, or says something else.
        """
        check_same_base(self.metadata["base_model"], model, "reference answers")
        held = [*(max(row.input_ids) for row in self.rows), *(int(part.max()) for part in self.tokens)]
        largest = max(*held, self.metadata["pad_token_id"])
        if largest >= (size := model.get_input_embeddings().weight.shape[0]):
            raise ArtifactError(f"The reference answers hold token {largest}, and this model has {size}.")
        longest, context = max(len(row.input_ids) for row in self.rows), context_length(model)
        if context is not None and longest > context:
            raise ArtifactError(
                f"The reference answers hold a row of {longest} tokens, and this model reads {context}."
            )
        with torch.no_grad():
            asked = _together(self.rows, range(min(BATCH_SIZE, len(self.rows))))
            start = torch.cat([self.kl(model, part) for part in asked])[:, 0].mean().item()
        if not start <= LARGEST_START:
            raise ArtifactError(
                f"The reference answers are of another model: before any training this one differs from them by {start:.2g} nats "
                "per token."
            )

    def save_pretrained(self, save_directory: str | PathLike) -> Path:
        """
        Save as `agl/reference_answers.safetensors` in a folder.

        Raises:
            `OSError`: If the file can't be written; a previous one is left as it was.
        """
        path = Path(save_directory) / FOLDER / REFERENCE_ANSWERS_FILE
        tensors = {
            "input_ids": torch.tensor([token for row in self.rows for token in row.input_ids], dtype=torch.int32),
            "lengths": torch.tensor([len(row.input_ids) for row in self.rows], dtype=torch.int32),
            "answer_starts": torch.tensor([row.answer_start for row in self.rows], dtype=torch.int32),
            "tokens": torch.cat(self.tokens),
            "log_probs": torch.cat(self.log_probs),
        }
        save_tensors(path, tensors, {**self.metadata, "kinds": self.kinds, "kind": "reference_answers"})
        return path

    @classmethod
    def from_pretrained(
        cls, location: str | PathLike, revision: str | None = None, token: str | bool | None = None
    ) -> Self:
        """
        Read reference answers from a folder that holds `agl/reference_answers.safetensors`, from the file itself, or from a repo on
        the Hub.

        Args:
            location (`str` or `PathLike`):
                Folder, file, or id of a repo.
            revision (`str`, *optional*):
                Branch, tag or commit of the repo.
            token (`str` or `bool`, *optional*):
                Token for a private or gated repo; by default the one that is logged in.

        Raises:
            [`ArtifactError`]: If there are none, or the file is broken, foreign or incomplete.
        """
        path = find_artifact(location, REFERENCE_ANSWERS_FILE, revision, token)
        tensors, metadata = read_artifact(path, "reference_answers", "reference answers", check_reference_answers)
        lengths, starts = tensors["lengths"].tolist(), tensors["answer_starts"].tolist()
        ids = [part.tolist() for part in tensors["input_ids"].split(lengths)]
        rows = [AlignmentRow(row, start) for row, start in zip(ids, starts, strict=True)]
        answers = [length - start for length, start in zip(lengths, starts, strict=True)]
        tokens, log_probs = (list(tensors[name].split(answers)) for name in ("tokens", "log_probs"))
        return cls(rows, metadata.pop("kinds"), tokens, log_probs, metadata)


def _log_probs(
    model: PreTrainedModel | PeftModel, rows: Sequence[AlignmentRow], pad_token_id: int
) -> Iterator[tuple[int, Tensor]]:
    """Of every row its number, and the log-probabilities of all tokens along its answer."""
    for indices in _together(rows, range(len(rows))):
        (batch,) = batches([rows[i] for i in indices], len(indices), pad_token_id, input_device(model))
        logits, mask = answer_logits(model, batch)
        for line, position in enumerate(batch.indices):
            yield indices[position], logits[line, mask[line]].float().log_softmax(-1)


def _together(rows: Sequence[AlignmentRow], indices: Sequence[int]) -> list[list[int]]:
    """Numbers of rows in batches of up to eight of similar length, of which long ones are fewer, the short ones first."""
    found: list[list[int]] = [[]]
    for index in sorted(indices, key=lambda i: len(rows[i].input_ids)):
        size = len(found[-1]) + 1
        if size > BATCH_SIZE or (size > 1 and size * len(rows[index].input_ids) > BATCH_TOKENS):
            found.append([])
        found[-1].append(index)
    return found
