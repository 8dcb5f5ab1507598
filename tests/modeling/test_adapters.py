"""Adapters as they load: the base stays the base, nothing of the file is lost, and what does not fit is named."""

import json

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ShiraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from agl_trl.artifacts.files import ArtifactError
from agl_trl.modeling.loading import load_adapter
from tests.helpers.models import moved_adapter, moved_by, tiny_model, tiny_vision_language_model


FILE = "adapter_model.safetensors"
IDS = torch.arange(20)[None] * 7 % 250


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def with_tensor(folder, name, tensor):
    save_file(load_file(folder / FILE) | {name: tensor}, folder / FILE)


def test_tensor_of_the_base_is_never_written_over(tmp_path):
    moved_adapter(tiny_model()).save_pretrained(tmp_path)
    with_tensor(tmp_path, "base_model.model.model.layers.0.mlp.down_proj.weight", torch.zeros(32, 48))
    base = tiny_model()
    before = logits(base)
    with pytest.raises(
        ArtifactError, match=r"'base_model\.model\.model\.layers\.0\.mlp\.down_proj\.weight', with other"
    ):
        load_adapter(base, tmp_path)
    assert torch.equal(base.model.layers[0].mlp.down_proj.weight, tiny_model().model.layers[0].mlp.down_proj.weight)
    assert before.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {"save_embedding_layers": True}),
        ({"target_modules": ["q_proj", "lm_head"]}, {}),  # PEFT adds the weight below
        ({"modules_to_save": ["lm_head"]}, {}),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, {"save_embedding_layers": True}),  # copies of both
        ({"trainable_token_indices": [3, 5]}, {"save_embedding_layers": True}),
    ],
)
def test_adapter_with_the_bases_own_tensors_loads_and_off_it_is_the_base(
    architecture, dtype, config, options, tmp_path
):
    """Also into a base in another type, which they are the rounded or unrounded form of."""
    tuned = moved_adapter(tiny_model(architecture), **config)
    tuned.save_pretrained(tmp_path, **options)
    assert len(load_file(tmp_path / FILE)) > 4
    loaded = load_adapter(tiny_model(architecture, dtype=dtype), tmp_path)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(tiny_model(architecture, dtype=dtype)))
    torch.testing.assert_close(
        logits(loaded).float(), logits(tuned), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05
    )


def test_adapter_of_a_deeper_and_of_a_shallower_model_is_refused(tmp_path):
    for depth, sentence in (
        (3, "no place for 'model.layers.2.self_attn.q_proj.lora_A.weight'"),
        (1, "it has no 'base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight'"),
    ):
        moved_adapter(tiny_model(num_hidden_layers=depth)).save_pretrained(tmp_path / str(depth))
        with pytest.raises(ArtifactError, match=sentence.replace(".", r"\.")):
            load_adapter(tiny_model(), tmp_path / str(depth))


def test_key_names_from_before_transformers_4_52_load(tmp_path):
    tuned = moved_adapter(tiny_vision_language_model(), target_modules=r".*language_model.*q_proj")
    tuned.save_pretrained(tmp_path)
    new, old = "base_model.model.model.language_model.", "base_model.model.language_model.model."
    tensors = {name.replace(new, old): tensor for name, tensor in load_file(tmp_path / FILE).items()}
    assert all(name.startswith(old) for name in tensors)
    save_file(tensors, tmp_path / FILE)
    loaded = load_adapter(tiny_vision_language_model(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(tuned), rtol=0, atol=1e-6)
    with loaded.disable_adapter():
        assert not torch.allclose(logits(loaded), logits(tuned), atol=1e-4)


@pytest.mark.parametrize(
    ("config", "changes", "sentence"),
    [
        (
            {"modules_to_save": ["embed_tokens"]},
            {},
            r"has shape \[270, 32\] there and \[260, 32\] here .*resized vocabulary",
        ),
        ({}, {"r": 4}, r"has shape \[2, 32\] there and \[4, 32\] here .*another rank"),
        ({}, {"modules_to_save": ["lm_head"]}, r"it has no 'base_model\.model\.lm_head\.weight'"),
    ],
)
def test_reason_is_told_where_an_adapter_does_not_load(config, changes, sentence, tmp_path):
    moved_adapter(tiny_model(vocab_size=270), **config).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(ArtifactError, match=sentence) as caught:
        load_adapter(tiny_model(), tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
        OFTConfig(oft_block_size=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        VeraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, task_type="CAUSAL_LM"),
        ShiraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),  # its file holds integers
        # These share what they train between layers: it is in the file once.
        VBLoRAConfig(r=2, vector_length=16, num_vectors=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        UniLoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        TinyLoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM"),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_methods_load_as_they_were_and_off_the_model_is_the_base(config, tmp_path):
    tuned = moved_by(tiny_model(), config)
    tuned.save_pretrained(tmp_path)
    loaded = load_adapter(tiny_model(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(tuned), rtol=0, atol=1e-5)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(tiny_model()))


def test_what_all_layers_share_must_be_in_the_file(tmp_path):
    config = VBLoRAConfig(r=2, vector_length=16, num_vectors=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    moved_by(tiny_model(), config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    del tensors["base_model.vblora_vector_bank"]
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(ArtifactError, match="it has no '.*vblora_vector_bank"):
        load_adapter(tiny_model(), tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapter_that_changes_the_base_as_it_loads_is_refused(init, tmp_path):
    moved_adapter(tiny_model(), init_lora_weights=init).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="changes the base model as it loads.* `--tuned`"):
        load_adapter(tiny_model(), tmp_path)


def test_adapter_that_asks_for_a_task_is_refused(tmp_path):
    config = PolyConfig(r=2, n_tasks=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="of type POLY, which needs the number of a task"):
        load_adapter(tiny_model(), tmp_path)
