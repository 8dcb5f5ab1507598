"""The anchor: a few protected rows now and then, whose KL to the reference model steers what protects, and is its gradient."""

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..fisher.reference_answers import ReferenceAnswers


class Anchor:
    """
    Rows of every protected behaviour in turn. Which ones is a function of the step alone, so that a resumed run goes on where it
    stopped, and all processes have the same.

    Args:
        references ([`ReferenceAnswers`]):
            Answers of the reference model.
        every (`int`):
            Optimizer steps between two anchored ones.
        batch_size (`int`):
            Rows of every behaviour per anchored step; those of its kinds (to refuse, to answer) take turns.
        seed (`int`):
            Seed of the order of rows.
    """

    def __init__(self, references: ReferenceAnswers, every: int, batch_size: int, seed: int):
        self.references, self.every = references, every
        self._kinds: dict[str, list[list[int]]] = {}
        self._batch_size: dict[str, int] = {}
        for behaviour in references.behaviours:
            rows = references.where(behaviour)
            kinds = [references.where(kind) for kind in sorted({references.kinds[i] for i in rows})]
            self._kinds[behaviour] = [_shuffled(kind, seed) for kind in kinds]
            self._batch_size[behaviour] = min(batch_size, len(rows))

    def due(self, step: int) -> bool:
        """Whether the optimizer step with this number, counted from 0, is an anchored one."""
        return step % self.every == 0

    def rows(self, behaviour: str, step: int) -> list[int]:
        """Numbers of the rows of a behaviour that a step visits."""
        kinds, size = self._kinds[behaviour], self._batch_size[behaviour]
        start = step // self.every * size
        chosen = []
        for number in range(start, start + size):
            kind = kinds[number % len(kinds)]
            chosen.append(kind[number // len(kinds) % len(kind)])
        return chosen

    def kl(self, model: PreTrainedModel | PeftModel, behaviour: str, step: int) -> Tensor:
        """
        Mean KL on a step's rows of a behaviour, in nats per answer token, of shape `(2,)`: as the budget has it, with a graph, and of
        the first five tokens alone.
        """
        return self.references.kl(model, self.rows(behaviour, step)).mean(0)


def _shuffled(rows: list[int], seed: int) -> list[int]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in order]
