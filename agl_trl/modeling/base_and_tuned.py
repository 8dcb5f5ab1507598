"""Base and tuned model as one thing to ask: an adapter that is switched off and on, or two checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel

from .lora import AdaptedLayer, at_reference


@dataclass(frozen=True)
class BaseAndTuned:
    """
    Base and tuned model.

    Args:
        tuned (`PreTrainedModel` or `PeftModel`):
            Tuned model; with `base` None a `PeftModel`, whose base answers while the adapter is off.
        base (`PreTrainedModel`, *optional*):
            Base model of a tuned model that is a checkpoint of its own.
        layers (`list[AdaptedLayer]`, *optional*):
            Layers with their references, of a continued adapter; its start then is the base.
    """

    tuned: PreTrainedModel | PeftModel
    base: PreTrainedModel | None = None
    layers: list[AdaptedLayer] | None = None

    @contextmanager
    def side(self, tuned: bool) -> Iterator[PreTrainedModel | PeftModel]:
        """One of the two, as it answers inside the `with` block."""
        if tuned or self.base is not None:
            yield self.tuned if tuned or self.base is None else self.base
            return
        with at_reference(self.tuned, self.layers or []):
            yield self.tuned
