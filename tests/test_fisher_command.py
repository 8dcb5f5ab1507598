"""Statistics as a product: planned, resumable, of large models, and published in a repo of their own."""

import json
import os

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import agl_trl.partial
from agl_trl import FisherStatistics, estimate_fisher
from agl_trl.artifacts import FISHER_FILE, FOLDER
from agl_trl.cli import app
from agl_trl.data import load_rows
from agl_trl.loading import load_model
from agl_trl.lora import layer_shape, linear_layers
from agl_trl.partial import PARTIAL_FILE
from agl_trl.plan import file_and_memory, plan_fisher
from agl_trl.push import PushError

from .models import tiny_model


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base")
    tiny_model(hidden_size=256, intermediate_size=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damping", [1.0, 0.1])
def test_plan_is_what_is_allocated_and_written(damping, tmp_path, tokenizer, alignment_rows):
    """One layer above the exact limit, so that the sketch counts too."""
    model = tiny_model(intermediate_size=1100)
    plan = plan_fisher(model, rank=8, damping=damping, batch_size=2)
    statistics = estimate_fisher(model, alignment_rows, tokenizer, rank=8, damping=damping, progress=False)
    path = statistics.save_pretrained(tmp_path)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert plan.file_bytes == path.stat().st_size - header
    assert (plan.layers, plan.inputs) == (len(statistics.input_of), len(statistics.inputs))
    dims = [X.dim for X in statistics.inputs.values()] + [G.dim for G in statistics.outputs.values()]
    assert plan.accumulator_bytes == sum(4 * d * (d if d <= 1024 else 16) + 12 for d in dims)
    assert plan.seconds_per_token > 0


def test_statistics_of_a_7b_shape_are_no_larger_than_its_rank_16_adapter():
    config = AutoConfig.for_model(
        "llama",
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        layers = linear_layers(model)
        shapes = {name: layer_shape(module) for name, module in layers.items()}
        adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    adapter = sum(4 * p.numel() for p in adapted.parameters() if p.requires_grad)  # float32, as PEFT saves it
    first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    input_of = {name: name.replace(leaf, first.get(leaf, leaf)) for name in layers for leaf in [name.split(".")[-1]]}
    assert len(layers) == 224 and len(set(input_of.values())) == 128
    _, file = file_and_memory(shapes, input_of, rank=64, damping=1.0)
    assert file <= adapter
    assert round(file / 1e6) == 95 and round(adapter / 1e6) == 160


def test_interrupted_pass_goes_on_and_ends_with_the_same_bytes(tmp_path, tokenizer, alignment_rows, monkeypatch):
    monkeypatch.setattr(agl_trl.partial, "SAVE_EVERY", 0.0)
    options = dict(rank=8, damping=0.5, batch_size=2, progress=False)
    model, passes = tiny_model(), []
    whole = estimate_fisher(model, alignment_rows, tokenizer, **options).save_pretrained(tmp_path / "whole")

    def count(*_):
        passes.append(1)
        if len(passes) == 4:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(count)
    with pytest.raises(KeyboardInterrupt):
        estimate_fisher(model, alignment_rows, tokenizer, resume_dir=tmp_path / "resumed", **options)
    unfinished = tmp_path / "resumed" / FOLDER / PARTIAL_FILE
    assert unfinished.is_file()
    handle.remove()
    copy = unfinished.read_bytes()

    # Sums of another pass are not used.
    estimate_fisher(model, alignment_rows, tokenizer, resume_dir=tmp_path / "resumed", **options | {"seed": 1})
    unfinished.write_bytes(copy)
    passes.clear()
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    resumed = estimate_fisher(model, alignment_rows, tokenizer, resume_dir=tmp_path / "resumed", **options)
    handle.remove()
    assert len(passes) == 2, "three of five batches were done"
    assert not unfinished.exists()
    assert resumed.save_pretrained(tmp_path / "resumed").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "options", [["--bits", "4"], ["--bits", "8"], ["--device-map", "cpu"], ["--dtype", "bfloat16"]]
)
def test_where_training_fits_estimation_fits(options, folder, tmp_path):
    if "--bits" in options:
        pytest.importorskip("bitsandbytes")
    rows = [{"prompt": f"do bad thing {i}", "completion": "Sorry, no."} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "fisher",
        "--model",
        str(folder),
        "--dataset",
        str(tmp_path / "rows.jsonl"),
        "--output-dir",
        str(tmp_path),
    ]
    outcome = run(*arguments, "--rank", "8", *options)
    assert outcome.exit_code == 0, outcome.exception
    assert "MB of sums beside the model" in outcome.output and "4 rows" in outcome.output
    statistics = FisherStatistics.from_pretrained(tmp_path)
    assert statistics.metadata["dataset"] is None and statistics.metadata["base_model"]["name"] is None
    model, _ = load_model(str(folder))
    statistics.check_fits(model, linear_layers(model))


def test_offloaded_weights(folder, tokenizer, alignment_rows):
    there, _ = load_model(str(folder))
    expected = estimate_fisher(there, alignment_rows, tokenizer, rank=8, progress=False)
    away = cpu_offload(load_model(str(folder))[0], execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in linear_layers(away)["model.layers.0.mlp.up_proj"].parameters())
    found = estimate_fisher(away, alignment_rows, tokenizer, rank=8, progress=False)
    for name, norm in expected.weight_norm.items():
        assert torch.equal(found.weight_norm[name], norm)


def test_statistics_get_a_repo_of_their_own(hub, online, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = run("fisher", "--model", "miniworld", "--dataset", "miniworld", "--push", "alice/miniworld-agl-fisher")
    assert outcome.exit_code == 0, outcome.exception
    (commit, *_) = hub.repo("alice/miniworld-agl-fisher").history()
    assert set(commit.files) == {".gitattributes", "README.md", "agl/fisher.safetensors"}
    card = commit.files["README.md"].data.decode()
    assert 'fisher_path="alice/miniworld-agl-fisher"' in card and str(tmp_path) not in card
    again = run("fisher", "--model", "miniworld", "--dataset", "miniworld", "--push", "alice/miniworld-agl-fisher")
    assert again.exit_code == 0
    assert hub.repo("alice/miniworld-agl-fisher").history()[0].sha == commit.sha, "the same bytes are no commit"
    assert FisherStatistics.from_pretrained("alice/miniworld-agl-fisher").metadata["dataset"] == "miniworld"


def test_the_commit_of_the_base_model_is_recorded(online, folder, tokenizer, alignment_rows):
    online.create_repo("alice/base")
    commit = online.upload_folder(repo_id="alice/base", folder_path=folder)
    model, _ = load_model("alice/base")
    statistics = estimate_fisher(model, alignment_rows, tokenizer, rank=8, progress=False)
    assert statistics.metadata["base_model"]["name"] == "alice/base"
    assert statistics.metadata["base_model"]["revision"] == commit.oid


def test_no_right_to_write_is_told_before_the_pass(hub, online, tmp_path):
    outcome = run(
        "fisher", "--model", "miniworld", "--dataset", "miniworld", "--push", "bob/x", "--output-dir", str(tmp_path)
    )
    assert isinstance(outcome.exception, PushError)
    assert str(outcome.exception) == "Can't create 'bob/x': this account may not write there."
    assert not os.listdir(tmp_path)


def test_bad_arguments_are_a_sentence():
    assert "`--bits` must be 4 or 8" in str(run("fisher", "--model", "x", "--dataset", "y", "--bits", "3").exception)
    assert "Say where the statistics go" in str(run("fisher", "--model", "x", "--dataset", "y").exception)


def test_rows_of_a_file_leave_no_path(tmp_path):
    from agl_trl.fisher_command import dataset_id

    (tmp_path / "rows.jsonl").write_text("{}")
    names = [str(tmp_path / "rows.jsonl"), str(tmp_path), "gone/rows.jsonl", "user/rows", "driftcaps"]
    assert [dataset_id(name) for name in names] == [None, None, None, "user/rows", "driftcaps"]
    assert load_rows("driftcaps") and (tmp_path / FISHER_FILE).exists() is False
