"""Models and adapters by name: nothing is unpickled or executed, and what does not load is one sentence."""

import json
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model

from agl_trl.artifacts.files import ArtifactError
from agl_trl.miniworld import load_model as load_embedded
from agl_trl.modeling.loading import load_adapter, load_model
from agl_trl.modeling.lora import adapted_layers
from tests.helpers.damage import Payload, nested
from tests.helpers.models import adapted, tiny_model


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_models_of_a_folder_and_of_the_package(tmp_path, tokenizer):
    saved = tiny_model()
    saved.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, found = load_model(str(tmp_path))
    assert same_weights(model, saved) and found.chat_template == tokenizer.chat_template
    assert load_model(str(tmp_path), dtype="bfloat16")[0].dtype == torch.bfloat16
    assert same_weights(load_model("miniworld")[0], load_embedded())


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("nowhere/model", {}, "Can't load the model 'nowhere/model': "),
        ("no such folder", {}, "Can't load the model 'no such folder': "),
        ("miniworld", {"dtype": "float99"}, "There is no type 'float99': name one such as "),
        ("miniworld", {"dtype": "nn"}, "There is no type 'nn': name one such as "),
        ("miniworld", {"bits": 4}, "The embedded model is loaded as it is: "),
    ],
)
def test_what_does_not_load_is_one_sentence(name, options, sentence):
    with pytest.raises(ValueError) as failed:
        load_model(name, **options)
    message = str(failed.value)
    assert message.startswith(sentence) and message.endswith(".") and "\n" not in message


def test_pickled_weights_are_not_opened(tmp_path, tokenizer):
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    with pytest.raises(ValueError, match="Can't load the model"):
        load_model(str(tmp_path))
    adapter = tmp_path / "adapter"
    adapted(0.1).save_pretrained(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    with pytest.raises(ArtifactError, match=r"There is no adapter in '.*': 'adapter_model.safetensors' is missing\."):
        load_adapter(tiny_model(), adapter)
    assert not (tmp_path / "marker").exists()


def test_code_of_a_repo_is_not_executed(tmp_path, tokenizer):
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    own = {"model_type": "theirs", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    with pytest.raises(ValueError, match="Can't load the model"):
        load_model(str(tmp_path))
    assert not (tmp_path / "marker").exists()


def test_adapter_is_the_one_that_was_saved(tmp_path):
    saved = adapted(0.2)
    saved.save_pretrained(tmp_path)
    loaded = load_adapter(tiny_model(), tmp_path)
    for one, other in zip(adapted_layers(loaded), adapted_layers(saved), strict=True):
        assert one.name == other.name and all(map(torch.equal, one.parameters(), other.parameters()))


def test_broken_adapter_config_is_refused(tmp_path):
    folder = tmp_path / "adapter"
    adapted(0.1).save_pretrained(folder)
    model, path = tiny_model(), folder / "adapter_config.json"
    good = path.read_text()
    for text in ("", "{", "[]", "3", "null", nested(100_000), good.replace('"r": 4', '"r": "x"'), "\x00", "{}"):
        path.write_text(text)
        with pytest.raises(ArtifactError) as caught:
            load_adapter(model, folder)
        assert str(caught.value).isprintable() and str(folder) in str(caught.value), text[:20]
    path.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ArtifactError):
        load_adapter(model, folder)


def test_adapter_of_other_layers_is_refused(tmp_path):
    """PEFT itself only warns, and would leave the layers without weights as they were drawn."""
    get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "v_proj"]}))
    with pytest.raises(ArtifactError, match="does not fit this base model: it has no .*v_proj"):
        load_adapter(tiny_model(), tmp_path)
