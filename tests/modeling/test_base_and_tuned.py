"""Base and tuned model as one thing to ask: either side is the model that it stands for, and is put back."""

import pytest
import torch
from torch import Tensor

from agl_trl.modeling.base_and_tuned import BaseAndTuned
from agl_trl.modeling.lora import adapted_layers
from tests.helpers.models import adapted, tiny_model


@torch.no_grad()
def logits(models: BaseAndTuned, tuned: bool) -> Tensor:
    with models.side(tuned) as model:
        return model(torch.arange(20, 40)[None]).logits


@torch.no_grad()
def logits_of(model) -> Tensor:
    return model.eval()(torch.arange(20, 40)[None]).logits


def test_adapter_off_is_the_base_model_and_on_the_tuned_one():
    model = adapted(0.3)
    models, tuned = BaseAndTuned(model), logits_of(model)
    assert torch.equal(logits(models, tuned=False), logits_of(tiny_model()))
    assert torch.equal(logits(models, tuned=True), tuned) and not torch.equal(tuned, logits_of(tiny_model()))
    assert torch.equal(logits_of(model), tuned), "put back"


def test_a_continued_adapter_starts_from_where_it_was():
    model = adapted(0.3)
    start, layers = logits_of(model), [layer.with_reference() for layer in adapted_layers(model)]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data.mul_(1.5)
    now, models = logits_of(model), BaseAndTuned(model, layers=layers)
    assert torch.equal(logits(models, tuned=False), start) and torch.equal(logits(models, tuned=True), now)
    assert not torch.equal(start, now)
    with pytest.raises(KeyboardInterrupt), models.side(tuned=False):
        raise KeyboardInterrupt
    assert torch.equal(logits_of(model), now), "put back after a failure too"


def test_two_checkpoints_are_themselves():
    base, tuned = tiny_model().eval(), tiny_model(seed=1).eval()
    models = BaseAndTuned(tuned, base)
    assert torch.equal(logits(models, tuned=False), logits_of(base))
    assert torch.equal(logits(models, tuned=True), logits_of(tuned))
