"""Tokens are in no file, log or message of ours, and nothing from a repository is unpickled or executed."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

from agl_trl import AGLSFTConfig, AGLSFTTrainer
from agl_trl.artifacts.files import ArtifactError
from agl_trl.artifacts.location import adapter_folder
from agl_trl.modeling.loading import load_adapter, load_model
from tests.helpers.commands import command
from tests.helpers.models import adapted, tiny_model
from tests.helpers.training import COMMON, lora


SECRET = "hf_SECRETsecretSECRET"


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "executed"


def holding(folder: Path, secret: str) -> set[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return {path.name for path in files if secret.encode() in path.read_bytes()}


@pytest.fixture
def trained(tokenizer, train_rows, alignment_rows, tmp_path, capsys, caplog):
    """Folder of a run whose config holds a token, and everything it said."""
    caplog.set_level(logging.DEBUG)
    config = AGLSFTConfig(
        str(tmp_path / "run"),
        **COMMON | dict(max_steps=2, save_strategy="steps", save_steps=1, disable_tqdm=False),
        hub_token=SECRET,
        push_to_hub=False,
    )
    trainer = AGLSFTTrainer(
        tiny_model(),
        config,
        train_dataset=train_rows,
        processing_class=tokenizer,
        peft_config=lora(),
        alignment_dataset=alignment_rows,
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert trainer.args.hub_token == SECRET
    captured = capsys.readouterr()
    return tmp_path / "run", captured.out + captured.err + caplog.text


def test_token_of_a_run_is_in_no_file_and_no_log(trained):
    folder, said = trained
    assert said and SECRET not in said
    assert {path.name for path in folder.rglob("*")} >= {"training_args.bin", "README.md", "fisher.safetensors"}
    assert holding(folder, SECRET) == set()


def test_token_of_the_environment_is_in_no_message(online, tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    out, adapter = tmp_path / "out", tmp_path / "adapter"
    adapted(0.1).save_pretrained(adapter)
    for arguments in (
        ("drift", "--base", "miniworld", "--adapter", "alice/private"),
        ("drift", "--base", "miniworld", "--adapter", adapter, "--fisher", "alice/private"),
        ("drift", "--base", "alice/private", "--adapter", adapter),
        ("project", "alice/private", "--base", "miniworld", "--budget", "0.01"),
        ("fisher", "--model", "alice/private", "--dataset", "miniworld"),
        ("fisher", "--model", "miniworld", "--dataset", "alice/private"),
    ):
        code, said, err = command(monkeypatch, capsys, *arguments, "--output-dir", out)
        assert code == 2 and "alice/private" in err and SECRET not in said + err + caplog.text, err
    assert not out.exists() or holding(out, SECRET) == set()


@pytest.fixture
def hostile(online, tokenizer, marker, tmp_path) -> str:
    """A repo that holds a model, and one that holds an adapter, whose weights are pickles, and code to go with them."""
    folder = tmp_path / "hostile"
    tokenizer.save_pretrained(folder)
    tiny_model().config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "hostile",
        "auto_map": {"AutoConfig": "modeling_x.Config", "AutoModelForCausalLM": "modeling_x.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_x.py").write_text(f"open({str(marker)!r}, 'w')\n")
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin"):
        torch.save({"weight": Payload(marker)}, folder / name)
    adapted(0.1).save_pretrained(tmp_path / "adapter")
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", folder)
    api = HfApi()
    api.create_repo("alice/hostile", exist_ok=True)
    api.upload_folder(repo_id="alice/hostile", folder_path=folder)
    return "alice/hostile"


def test_repos_of_pickles_and_code_are_refused(hostile, marker, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "hostile"
    with pytest.raises(ArtifactError, match="There is no adapter in 'alice/hostile'"):
        adapter_folder(hostile)
    for refuse in (lambda: adapter_folder(folder), lambda: load_adapter(tiny_model(), folder)):
        with pytest.raises(ArtifactError, match="'adapter_model.safetensors' is missing"):
            refuse()
    (folder / "adapter_config.json").unlink()  # of a model alone
    HfApi().delete_file("adapter_config.json", hostile)
    for location in (hostile, str(folder)):
        with pytest.raises(ValueError, match="Can't load the model") as caught:
            load_model(location)
        assert "\n" not in str(caught.value)
        assert "trust_remote_code" in str(caught.value) or "custom code" in str(caught.value), caught.value
    for arguments in (("--base", "miniworld", "--adapter", hostile), ("--base", hostile, "--tuned", hostile)):
        code, _, err = command(monkeypatch, capsys, "drift", *arguments, "--output-dir", tmp_path / "out")
        assert code == 2 and "alice/hostile" in err, err
    assert not marker.exists() and "modeling_x" not in sys.modules


def test_model_whose_weights_are_pickles_is_refused(hostile, marker, tmp_path):
    """The architecture is one of transformers, so that nothing but the kind of the weights is in the way."""
    folder = tmp_path / "hostile"
    tiny_model().config.save_pretrained(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="Can't load the model .*safetensors"):
        load_model(str(folder))
    HfApi().upload_file(path_or_fileobj=folder / "config.json", path_in_repo="config.json", repo_id=hostile)
    HfApi().delete_file("adapter_config.json", hostile)
    with pytest.raises(ValueError, match="Can't load the model 'alice/hostile'"):
        load_model(hostile)  # it asks the Hub for a converted copy, which the local Hub does not know
    assert not marker.exists()


def test_pickles_beside_safetensors_are_not_read(marker, tmp_path):
    """A folder that is all right, with pickles next to the weights."""
    model = adapted(0.1)
    model.save_pretrained(tmp_path / "adapter")
    for name in ("adapter_model.bin", "training_args.bin", "pytorch_model.bin"):
        torch.save({"weight": Payload(marker)}, tmp_path / "adapter" / name)
    load_adapter(tiny_model(), adapter_folder(tmp_path / "adapter"))
    assert not marker.exists()
    torch.load(tmp_path / "adapter" / "adapter_model.bin", weights_only=False)
    assert marker.exists(), "the pickles of these tests do what they must not"
