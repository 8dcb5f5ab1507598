"""Hooks that accumulate one pass: every token once, shared inputs once, and nothing left behind."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from agl_trl import estimate_fisher
from agl_trl.data.alignment import AlignmentRow, batches, tokenize_row
from agl_trl.fisher.collector import Collector
from agl_trl.modeling.lora import linear_layers
from tests.helpers.models import tiny_model


def collected(
    rows: list[AlignmentRow], model=None, size: int = 2, shard=(0, 1), skip: int = 0, into=None
) -> Collector:
    """A forward-only pass over all batches but the first few."""
    model = tiny_model().eval() if model is None else model
    collector = Collector(linear_layers(model), 8, gradients=False, seed=0) if into is None else into
    with collector, torch.no_grad():
        for batch in list(batches(rows, size, 0, torch.device("cpu"), shard))[skip:]:
            collector.begin(batch.token_mask.flatten())
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return collector


def test_shards_add_up_to_the_whole(tokenizer, alignment_rows):
    """What several processes sum, on one: every row once, whatever the number of shards."""
    rows, model = [tokenize_row(row, tokenizer) for row in alignment_rows], tiny_model().eval()
    whole = collected(rows, model)
    shards = [collected(rows, model, shard=(process, 3)) for process in range(3)]
    for name, sketch in whole.inputs.items():
        assert sum(shard.inputs[name].count for shard in shards) == sketch.count
        total = sum(shard.inputs[name].sums for shard in shards)
        torch.testing.assert_close(total, sketch.sums, rtol=1e-4, atol=1e-4)


def test_layer_without_tokens_is_named(tokenizer, alignment_rows):
    """Of an adapter it can't be guarded; of a plain model it is left out."""
    model = tiny_model()
    model.model.layers[1].unused = torch.nn.Linear(32, 32)
    statistics = estimate_fisher(model, alignment_rows, tokenizer, progress=False)
    assert statistics.metadata["skipped_layers"] == ["model.layers.1.unused"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.unused' saw no tokens"):
        estimate_fisher(adapted, alignment_rows, tokenizer, progress=False)


def test_layers_that_read_the_same_input_share_it(tokenizer, alignment_rows):
    statistics = estimate_fisher(tiny_model(), alignment_rows, tokenizer, progress=False)
    block = "model.layers.0."
    shared = {
        name: statistics.input_of[block + name] for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
    }
    assert shared == {
        "self_attn.k_proj": block + "self_attn.q_proj",
        "self_attn.v_proj": block + "self_attn.q_proj",
        "mlp.up_proj": block + "mlp.gate_proj",
    }
    assert len(statistics.inputs) == 2 * 4 and not statistics.outputs


def test_pass_that_goes_on_from_its_sums_is_the_whole_pass(tokenizer, alignment_rows):
    rows, model = [tokenize_row(row, tokenizer) for row in alignment_rows], tiny_model().eval()
    whole = collected(rows, model)
    half = collected(sorted(rows, key=lambda row: len(row.input_ids))[:6], model)
    sums = {
        name: {"sums": sketch.sums, "trace": sketch.trace, "count": sketch.count}
        for name, sketch in half.inputs.items()
    }
    resumed = Collector(linear_layers(model), 8, gradients=False, seed=0)
    assert resumed.restore(3, half.input_of, {"inputs": sums}) == 3
    collected(rows, model, skip=3, into=resumed)
    assert resumed.input_of == whole.input_of
    for name, sketch in whole.inputs.items():
        for part in ("sums", "trace", "count"):
            assert torch.equal(getattr(resumed.inputs[name], part), getattr(sketch, part)), (name, part)


def test_hooks_live_as_long_as_the_block(tokenizer, alignment_rows):
    model = tiny_model().eval()
    collector = Collector(linear_layers(model), 8, gradients=True, seed=0)
    with pytest.raises(KeyboardInterrupt), collector:
        assert all(len(module._forward_hooks) == 1 for module in linear_layers(model).values())
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in model.modules())


def test_layer_that_sees_other_rows_than_tokens_is_named():
    model = tiny_model().eval()
    collector = Collector(linear_layers(model), 8, gradients=False, seed=0)
    collector.begin(torch.ones(5, dtype=torch.bool))
    with collector, pytest.raises(ValueError, match=r"q_proj' saw 4 rows for 5 tokens: layers that do not see every"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_activations_that_overflow_are_named(tokenizer, alignment_rows):
    model = tiny_model()
    model.model.layers[1].input_layernorm.weight.data.fill_(torch.inf)
    sentence = r"statistics of layer 'model\.layers\.1\..*' are not finite: its activations overflow; use bfloat16"
    with pytest.raises(ValueError, match=sentence):
        estimate_fisher(model, alignment_rows, tokenizer, progress=False)
