"""What an adapter trains beside LoRA, and what of a checkpoint changed: named once, and measured by its norm."""

import pytest
import torch

from agl_trl.modeling.loading import load_adapter
from agl_trl.modeling.lora import adapted_layers, at_reference, trained_outside_lora
from agl_trl.modeling.reference_factors import load_reference, save_reference
from agl_trl.modeling.trained_tensors import changed_tensors
from tests.helpers.models import moved_adapter, tiny_model


KINDS = {
    "head": {"modules_to_save": ["lm_head"]},
    "head and embeddings": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norm": {"modules_to_save": ["input_layernorm"]},
    "tokens": {"trainable_token_indices": [3, 7]},
}
IDS = torch.arange(20)[None] * 7 % 250


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def changes(model):
    return {tensor.name: tensor.relative_change() for tensor in adapted_layers(model)[0].beside}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_an_adapter_and_its_merged_copy_changed_the_same_tensors_as_far(architecture, kind, tmp_path):
    moved_adapter(tiny_model(architecture), **KINDS[kind]).save_pretrained(tmp_path)
    loaded = load_adapter(tiny_model(architecture), tmp_path)
    found, outside = changes(loaded), trained_outside_lora(loaded)
    assert len(outside) == len(found) > 0 and not any(parameter.requires_grad for parameter in loaded.parameters())
    base, merged = tiny_model(architecture), load_adapter(tiny_model(architecture), tmp_path).merge_and_unload()
    queries = {name for name, _ in base.named_parameters() if "q_proj" in name}
    assert found == pytest.approx(changed_tensors(base, merged, queries), rel=1e-4)
    for name, change in found.items():
        before, after = base.get_parameter(name), merged.get_parameter(name)
        # Gemma's norms are zero at the start.
        expected = (after - before).norm() / before.norm() if before.any() else torch.tensor(1.0)
        assert change == pytest.approx(expected.item(), rel=1e-4)


def test_tensor_that_has_not_moved_or_was_rounded_counts_as_unchanged(tmp_path):
    model = moved_adapter(tiny_model(), scale=0.0, modules_to_save=["lm_head"])
    assert changes(model) == {"lm_head.weight": 0.0}
    assert changed_tensors(tiny_model(), tiny_model(dtype=torch.bfloat16), ()) == {}
    assert changed_tensors(tiny_model(dtype=torch.bfloat16), tiny_model(dtype=torch.bfloat16).float(), ()) == {}


def test_models_that_differ_in_their_tensors_are_told():
    with pytest.raises(ValueError, match=r"The tuned model has no tensor 'model\.layers\.1"):
        changed_tensors(tiny_model(), tiny_model(num_hidden_layers=1), ())
    with pytest.raises(ValueError, match=r"The base model has no tensor 'model\.layers\.2"):
        changed_tensors(tiny_model(), tiny_model(num_hidden_layers=3), ())
    found = changed_tensors(tiny_model(), tiny_model(vocab_size=270), ())
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {*found}, "new rows are a change"


@pytest.mark.parametrize("kind", KINDS)
def test_start_of_a_continued_adapter_is_its_start_in_all_that_it_trains(kind, tmp_path):
    model = moved_adapter(tiny_model(), **KINDS[kind])
    start = logits(model)
    layers = [layer.with_reference() for layer in adapted_layers(model)]
    assert all(tensor.relative_change() == 0 for tensor in layers[0].beside)
    save_reference(tmp_path, layers)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    end = logits(model)
    assert (end - start).abs().max() > 1e-3
    for measured in (
        layers,
        load_reference(tmp_path, adapted_layers(model)),
    ):  # of the run, and of one that is resumed
        with at_reference(model, measured):
            assert torch.equal(logits(model), start)
        assert torch.equal(logits(model), end)
        (tensor, *_) = measured[0].beside
        expected = 0.05 * torch.linalg.vector_norm(torch.ones_like(tensor.parameter())) / tensor.frozen.weight.norm()
        assert tensor.relative_change() == pytest.approx(expected.item(), rel=0.3)
