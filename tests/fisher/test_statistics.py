"""Fisher statistics as an object and a file: bit for bit the same after a round trip, and refused where they do not fit."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file

from agl_trl import FisherStatistics, estimate_fisher
from agl_trl.artifacts.files import SCHEMA_VERSION, ArtifactError, canonical_json, load_tensors
from agl_trl.modeling.lora import adapted_layers, base_weight, linear_layers
from tests.helpers import reference
from tests.helpers.models import adapted, tiny_model
from tests.helpers.reference import dense_metric


@pytest.fixture(scope="module")
def statistics(tokenizer, alignment_rows) -> FisherStatistics:
    return estimate_fisher(tiny_model(), alignment_rows, tokenizer, shrinkage=0.3, progress=False)


def test_statistics_survive_the_round_trip_bit_for_bit(statistics, tmp_path):
    path = statistics.save_pretrained(tmp_path)
    assert path == tmp_path / "agl" / "fisher.safetensors"
    for location in (tmp_path, path, path.parent):
        loaded = FisherStatistics.from_pretrained(location)
        assert loaded.metadata == statistics.metadata and loaded.input_of == statistics.input_of
        for name in statistics.input_of:
            one, two = statistics.metric(name), loaded.metric(name)
            assert all(
                torch.equal(a, b) for a, b in zip([*one.input, *one.output], [*two.input, *two.output], strict=True)
            )
            assert torch.equal(one.weight_norm, two.weight_norm)
    again = loaded.save_pretrained(tmp_path / "again")
    assert again.read_bytes() == path.read_bytes()


def test_layout_of_the_file(statistics, tmp_path):
    tensors, metadata = load_tensors(statistics.save_pretrained(tmp_path))
    shared = "inputs.model.layers.0.self_attn.q_proj"
    assert (
        tensors[f"{shared}.eigenvectors"].shape == (32, 32)
        and tensors[f"{shared}.eigenvectors"].dtype == torch.bfloat16
    )
    assert tensors[f"{shared}.eigenvalues"].shape == (32,) and tensors[f"{shared}.remainder"].shape == ()
    assert "inputs.model.layers.0.self_attn.k_proj.eigenvectors" not in tensors
    assert tensors["outputs.model.layers.0.self_attn.k_proj.eigenvectors"].shape == (16, 16)
    assert (
        tensors["weight_norm.model.layers.1.mlp.down_proj"].shape == ()
        and tensors["num_tokens"] == statistics.num_tokens
    )
    assert (
        metadata["schema_version"] == SCHEMA_VERSION and metadata["kind"] == "fisher" and metadata["shrinkage"] == 0.3
    )
    assert metadata["base_model"]["config"]["hidden_size"] == 32 and metadata["base_model"]["name"] is None


def test_file_of_schema_1_is_read_with_its_shrinkage(statistics, tmp_path):
    """Schema 1 said damping for shrinkage and had no checksum."""
    tensors, metadata = load_tensors(statistics.save_pretrained(tmp_path / "now"))
    early = {name: value for name, value in metadata.items() if name != "shrinkage"}
    early |= {"schema_version": 1, "damping": metadata["shrinkage"]}
    path = tmp_path / "early.safetensors"
    save_file(tensors, path, metadata={"agl": canonical_json(early)})
    loaded = FisherStatistics.from_pretrained(path)
    assert loaded.shrinkage == statistics.shrinkage == 0.3 and "damping" not in loaded.metadata
    for name in statistics.input_of:  # and G is shrunk by it
        for one, other in zip(dense_metric(loaded.metric(name)), dense_metric(statistics.metric(name)), strict=True):
            assert torch.equal(one, other)
    again = loaded.save_pretrained(tmp_path / "again")
    assert again.read_bytes() == (tmp_path / "now" / "agl" / "fisher.safetensors").read_bytes(), "as schema 2"
    with safe_open(again, "pt") as file:
        assert json.loads(file.metadata()["agl"])["schema_version"] == SCHEMA_VERSION == 2


def test_drift_and_form_of_a_layer_equal_dense_float64(statistics):
    model = adapted(0.2)
    drifts, forms = statistics.relative_drift(model), statistics.quadratic_form(model)
    assert list(drifts) == list(forms) == list(statistics.input_of)
    for layer in adapted_layers(model):
        A, B, s = layer.factors()
        X, G = dense_metric(statistics.metric(layer.name))
        moved = reference.quadratic_form((s * B.double() @ A.double()).detach(), X, G).item()
        whole = reference.quadratic_form(base_weight(layer.module).double(), X, G).item()
        assert forms[layer.name] == pytest.approx(moved, rel=1e-4)
        assert drifts[layer.name] == pytest.approx(moved / whole, rel=1e-4)


def test_layer_whose_drift_has_no_scale_is_named(statistics):
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    with pytest.raises(
        ValueError, match=r"'model\.layers\.0\.mlp\.up_proj' has the weight norm 0 in the Fisher metric"
    ):
        statistics.weight_norms(linear_layers(model))


def test_another_base_model_is_told_by_what_differs(statistics):
    for changed, difference in (
        (tiny_model(hidden_size=64), "hidden_size is 32 there and 64 here"),
        (tiny_model("mistral"), "model_type is llama there and mistral here"),
    ):
        with pytest.raises(ArtifactError, match=f"of another base model: {difference}"):
            statistics.check_fits(changed, linear_layers(changed))
    model = tiny_model(seed=1)
    model.model.layers[0].mlp.up_proj.weight.data *= 2
    with pytest.raises(ArtifactError, match="of other weights: the norm of layer"):
        statistics.check_fits(model, linear_layers(model))
    model = tiny_model()
    statistics.check_fits(model, linear_layers(model))


def test_layers_that_are_not_covered_are_named(tokenizer, alignment_rows):
    some = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    statistics = estimate_fisher(some, alignment_rows, tokenizer, progress=False)
    every = adapted(0.1)
    with pytest.raises(ArtifactError, match=r"cover 4 layers, but not 'model\.layers\.0\.self_attn\.k_proj'"):
        statistics.check_fits(every, linear_layers(every))
    statistics.check_fits(some, linear_layers(some))


def test_what_published_statistics_leave_out_is_told_with_what_to_do(tokenizer, alignment_rows):
    """Of a plain model: without the head, and without what does not see every token."""
    statistics = estimate_fisher(tiny_model(), alignment_rows, tokenizer, progress=False)
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(
        ArtifactError, match="not the output head 'lm_head'.*`agl-trl drift` without `--fisher`, a trainer"
    ):
        statistics.check_fits(model, linear_layers(model))
    name = "model.layers.1.self_attn.q_proj"
    del statistics.input_of[name]
    statistics.metadata["skipped_layers"] = [name]
    with pytest.raises(ArtifactError, match=f"leave out '{name}'.*does not see every token.*out of `target_modules`"):
        statistics.check_fits(model, linear_layers(model))
