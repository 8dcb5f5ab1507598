"""What a pass will take, told from shapes: the very bytes that are allocated and written."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from agl_trl.data.alignment import tokenize_row
from agl_trl.fisher.cost import covariance_bytes, file_and_memory, fisher_cost, seconds_by_trial
from agl_trl.modeling.lora import linear_layers
from agl_trl.objective.covariance import EXACT_UP_TO, CovarianceSketch, sketch_matrix
from tests.helpers.models import tiny_model


# Below the exact limit, at it, above it, and above it with a rank at which a sketch would save nothing.
@pytest.mark.parametrize(("dim", "rank"), [(40, 8), (40, 64), (EXACT_UP_TO, 8), (EXACT_UP_TO + 1, 8), (1100, 600)])
def test_bytes_of_one_covariance_are_those_of_its_tensors(dim, rank):
    sketch = CovarianceSketch(dim, sketch_matrix(dim, rank, seed=0))
    sketch.update(torch.randn(3, dim, generator=torch.Generator().manual_seed(0)))
    sums = sum(tensor.nbytes for tensor in (sketch.sums, sketch.trace, sketch.count))
    kept = sketch.covariance(rank)
    kept = kept._replace(eigenvectors=kept.eigenvectors.bfloat16())
    assert covariance_bytes(dim, rank) == (sums, sum(tensor.nbytes for tensor in kept))


def test_layers_that_share_an_input_are_counted_once():
    shapes, alone = {"q": (8, 16), "k": (4, 16)}, {"q": "q", "k": "k"}
    shared = {"q": "q", "k": "q"}
    one, two = (file_and_memory(shapes, input_of, rank=2, shrinkage=1.0) for input_of in (shared, alone))
    of_one = covariance_bytes(16, 2)
    assert (two[0] - one[0], two[1] - one[1]) == of_one
    both = file_and_memory(shapes, shared, rank=2, shrinkage=0.5)
    outputs = [covariance_bytes(dim, 2) for dim in (8, 4)]
    assert (both[0] - one[0], both[1] - one[1]) == tuple(map(sum, zip(*outputs, strict=True)))


def test_plan_counts_what_the_adapter_adapts():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "k_proj", "down_proj"]))
    plan = fisher_cost(model, rank=8, shrinkage=1.0)
    assert (plan.layers, plan.inputs) == (6, 4), "q and k read the same input, in either of two blocks"
    assert not any(module._forward_hooks for module in model.modules())


def test_model_without_linear_layers_is_told():
    model = tiny_model()
    model.model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match=r"^The model has no linear layer to measure\.$"):
        fisher_cost(model, rank=8, shrinkage=1.0)


def test_trial_leaves_the_model_as_it_was_and_grows_with_the_rows(tokenizer, alignment_rows):
    model = tiny_model().train()
    rows = [tokenize_row(row, tokenizer) for row in alignment_rows]
    options = dict(fisher_type="projection", rank=8, shrinkage=0.5, batch_size=2, seed=0)
    few = min(seconds_by_trial(model, rows, tokenizer, **options) for _ in range(3))
    many = min(seconds_by_trial(model, rows * 30, tokenizer, **options) for _ in range(3))
    assert 0 < few < many
    assert model.training and not any(module._forward_hooks for module in linear_layers(model).values())
    assert all(parameter.grad is None for parameter in model.parameters())
