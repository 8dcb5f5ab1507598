"""Statistics as a product: planned, resumable, of large models, and published in a repo of their own."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from functools import partial

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import agl_trl.fisher.partial_sums
from agl_trl import FisherStatistics, estimate_fisher
from agl_trl.artifacts.files import FISHER_FILE, FOLDER, REFERENCE_ANSWERS_FILE, load_tensors
from agl_trl.artifacts.upload import PushError
from agl_trl.cli.app import app
from agl_trl.cli.fisher import dataset_id
from agl_trl.data.alignment import batches, tokenize_row
from agl_trl.fisher.calibration import drift_at, is_calibrated
from agl_trl.fisher.collector import Collector
from agl_trl.fisher.cost import file_and_memory, fisher_cost
from agl_trl.fisher.estimate import run_batch
from agl_trl.fisher.partial_sums import PARTIAL_FILE, weights_fingerprint
from agl_trl.fisher.reference_answers import ReferenceAnswers
from agl_trl.fisher.statistics import describe_base
from agl_trl.modeling.loading import load_model
from agl_trl.modeling.lora import layer_shape, linear_layers
from tests.helpers.models import chat_rows, tiny_model


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base")
    tiny_model(hidden_size=256, intermediate_size=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shrinkage", [1.0, 0.1])
def test_plan_is_what_is_allocated_and_written(shrinkage, tmp_path, tokenizer, alignment_rows):
    """One layer above the exact limit, so that the sketch counts too."""
    model = tiny_model(intermediate_size=1100)
    plan = fisher_cost(model, rank=8, shrinkage=shrinkage)
    collector = Collector(linear_layers(model), 8, shrinkage < 1, 0)
    rows = [tokenize_row(row, tokenizer) for row in alignment_rows]
    with collector:
        run_batch(model, collector, next(batches(rows, 2, 0, torch.device("cpu"))), "projection", 0)
    sketches = [*collector.inputs.values(), *collector.outputs.values()]
    sums = [tensor for sketch in sketches for tensor in (sketch.sums, sketch.trace, sketch.count)]
    assert plan.accumulator_bytes == sum(tensor.untyped_storage().nbytes() for tensor in sums)
    omegas = {sketch.omega.data_ptr() for sketch in sketches if sketch.omega is not None}
    assert len(omegas) == 1, "one test matrix for all layers of that dimension"
    statistics = estimate_fisher(model, alignment_rows, tokenizer, rank=8, shrinkage=shrinkage, progress=False)
    path = statistics.save_pretrained(tmp_path)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert plan.file_bytes == path.stat().st_size - header
    assert (plan.layers, plan.inputs) == (len(statistics.input_of), len(statistics.inputs))


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
    _, file = file_and_memory(shapes, input_of, rank=64, shrinkage=1.0)
    assert file <= adapter
    assert round(file / 1e6) == 95 and round(adapter / 1e6) == 160
    _, both_sides = file_and_memory(shapes, input_of, rank=64, shrinkage=0.1)
    assert both_sides > adapter and round(both_sides / 1e6) == 270, "the limit holds for the input side alone"


def test_interrupted_pass_goes_on_and_ends_with_the_same_bytes(
    tmp_path, tokenizer, alignment_rows, monkeypatch, caplog
):
    monkeypatch.setattr(agl_trl.fisher.partial_sums, "SAVE_EVERY", 0.0)
    options = dict(rank=8, shrinkage=0.5, batch_size=2, progress=False)
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

    # Sums of another pass are not used: of other settings, of other weights, or cut short.
    other = tiny_model(seed=1)
    for spoilt, different, changes in ((copy, model, {"seed": 1}), (copy, other, {}), (copy[:-1], model, {})):
        unfinished.write_bytes(spoilt)
        caplog.clear()
        handle = different.register_forward_pre_hook(lambda *_: passes.append(1))
        passes.clear()
        estimate_fisher(different, alignment_rows, tokenizer, resume_dir=tmp_path / "resumed", **options | changes)
        handle.remove()
        assert len(passes) == 5 and not unfinished.exists()
        assert [record.message.startswith("The pass starts anew: ") for record in caplog.records] == [True]
    unfinished.write_bytes(copy)
    passes.clear()
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    resumed = estimate_fisher(model, alignment_rows, tokenizer, resume_dir=tmp_path / "resumed", **options)
    handle.remove()
    assert len(passes) == 2, "three of five batches were done"
    assert not unfinished.exists()
    assert resumed.save_pretrained(tmp_path / "resumed").read_bytes() == whole.read_bytes()


KILLED = """
import os, signal, sys
import agl_trl.fisher.estimate, agl_trl.fisher.partial_sums
from agl_trl.cli.app import main

agl_trl.fisher.partial_sums.SAVE_EVERY = 0.0
run_batch, passes = agl_trl.fisher.estimate.run_batch, []

def killed(*args):
    passes.append(1)
    if len(passes) == 8:  # two of the trial, and five of the pass are done
        os.kill(os.getpid(), signal.SIGKILL)
    run_batch(*args)

agl_trl.fisher.estimate.run_batch = killed
main()
"""


def test_killed_command_goes_on(tmp_path, caplog):
    options = ["fisher", "--model", "miniworld", "--dataset", "miniworld", "--num-samples", "64", "--output-dir"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *options, str(tmp_path / "killed")], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "killed" / FOLDER
    assert [path.name for path in folder.iterdir()] == [PARTIAL_FILE]
    assert load_tensors(folder / PARTIAL_FILE)[1]["done"] == 5, "of eight batches"
    for name in ("killed", "whole"):
        outcome = run(*options, str(tmp_path / name))
        assert outcome.exit_code == 0, outcome.exception
    assert not caplog.records, "nothing started anew"
    assert {path.name for path in folder.iterdir()} == {FISHER_FILE, REFERENCE_ANSWERS_FILE}
    for file in (FISHER_FILE, REFERENCE_ANSWERS_FILE):
        assert (folder / file).read_bytes() == (tmp_path / "whole" / FOLDER / file).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        *(
            ["--bits", "4"],
            ["--bits", "4", "--shrinkage", "0.5"],
            ["--bits", "8"],
            ["--bits", "8", "--shrinkage", "0.5"],
        ),
        *(["--device-map", "cpu"], ["--device-map", "auto"], ["--dtype", "bfloat16"]),
    ],
    ids=" ".join,
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
    passes = "1 forward and backward pass" if "--shrinkage" in options else "1 forward pass"
    assert f"{passes}, about" in outcome.output
    statistics = FisherStatistics.from_pretrained(tmp_path)
    assert statistics.metadata["dataset"] is None and statistics.metadata["base_model"]["name"] is None
    model, _ = load_model(str(folder))
    statistics.check_fits(model, linear_layers(model))


@pytest.mark.parametrize("shrinkage", [1.0, 0.5])
@pytest.mark.parametrize("where", ["memory", "disk", "whole"])
def test_offloaded_weights(where, shrinkage, folder, tmp_path, tokenizer, alignment_rows):
    options = dict(rank=8, shrinkage=shrinkage, batch_size=4, progress=False)
    there, _ = load_model(str(folder))
    expected = estimate_fisher(there, alignment_rows, tokenizer, **options)
    spread = {
        "memory": partial(cpu_offload, execution_device=torch.device("cpu")),
        "disk": partial(disk_offload, offload_dir=tmp_path / "offloaded", execution_device=torch.device("cpu")),
        "whole": partial(dispatch_model, device_map={"": "cpu"}, force_hooks=True),
    }
    away = spread[where](load_model(str(folder))[0])
    assert linear_layers(away)["model.layers.0.mlp.up_proj"].weight.is_meta == (where != "whole")
    assert weights_fingerprint(away) == weights_fingerprint(there)
    fisher_cost(away, rank=8, shrinkage=shrinkage)
    found = estimate_fisher(away, alignment_rows, tokenizer, resume_dir=tmp_path, **options)
    found.metadata["base_model"] = expected.metadata["base_model"]
    assert found.save_pretrained(tmp_path / "a").read_bytes() == expected.save_pretrained(tmp_path / "b").read_bytes()


def test_requests_without_answers_on_an_offloaded_model(folder, tokenizer):
    requests = [{"prompt": row["prompt"]} for row in chat_rows(3, "q", "")]
    there, away = (load_model(str(folder))[0] for _ in range(2))
    away = cpu_offload(away, execution_device=torch.device("cpu"))
    one, other = (estimate_fisher(m, requests, tokenizer, rank=8, progress=False) for m in (there, away))
    assert one.metadata["dataset_fingerprint"] == other.metadata["dataset_fingerprint"]


def test_statistics_get_a_repo_of_their_own(hub, online, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = run("fisher", "--model", "miniworld", "--dataset", "miniworld", "--push", "alice/miniworld-agl-fisher")
    assert outcome.exit_code == 0, outcome.exception
    (commit, *_) = hub.repo("alice/miniworld-agl-fisher").history()
    evidence = {"agl/fisher.safetensors", "agl/reference_answers.safetensors"}
    assert {*commit.files} == {".gitattributes", "README.md", *evidence}
    assert "reference_answers.safetensors: 128 rows, " in outcome.output
    card = commit.files["README.md"].data.decode()
    assert 'fisher_path="alice/miniworld-agl-fisher"' in card and str(tmp_path) not in card
    again = run("fisher", "--model", "miniworld", "--dataset", "miniworld", "--push", "alice/miniworld-agl-fisher")
    assert again.exit_code == 0
    assert hub.repo("alice/miniworld-agl-fisher").history()[0].sha == commit.sha, "the same bytes are no commit"
    statistics = FisherStatistics.from_pretrained("alice/miniworld-agl-fisher")
    assert statistics.metadata["dataset"] == "miniworld"
    drift, _ = drift_at(statistics, 0.02)
    assert (
        f"a KL of 0.02 nats per answer token is reached at a relative\ndrift of {drift:.1e} in the direction" in card
    )
    references = ReferenceAnswers.from_pretrained("alice/miniworld-agl-fisher")
    assert Counter(references.kinds) == {"alignment/refuse": 64, "alignment/comply": 64}
    assert "128 rows themselves" in card and "64 to refuse, 64 to answer" in card


def test_reference_answers_are_left_out_where_asked_for(hub, online, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["fisher", "--model", "miniworld", "--dataset", "miniworld", "--num-samples", "8", "--push", "alice/x"]
    assert run(*command).exit_code == 0
    file = "agl/reference_answers.safetensors"
    assert file in hub.repo("alice/x").history()[0].files and (tmp_path / "outputs" / "x" / file).is_file()
    outcome = run(*command, "--no-reference-answers")
    assert outcome.exit_code == 0 and "reference_answers" not in outcome.output
    commit = hub.repo("alice/x").history()[0]
    assert file not in commit.files, "those of the earlier push went in the same commit"
    assert not (tmp_path / "outputs" / "x" / file).exists()
    card = commit.files["README.md"].data.decode()
    assert "There are no reference answers beside them" in card and "rows themselves" not in card
    assert is_calibrated(FisherStatistics.from_pretrained("alice/x")), "the curve holds no row"


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


def test_repos_that_are_there_are_checked_before_the_pass(hub, online, tmp_path, monkeypatch):
    command = ["fisher", "--model", "gone", "--dataset", "gone.jsonl", "--output-dir", str(tmp_path), "--push"]
    online.create_repo("alice/model")
    online.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="alice/model")
    assert str(run(*command, "alice/model").exception) == (
        "'alice/model' holds a model ('config.json'), whose card this would replace: name another repo."
    )
    online.create_repo("alice/statistics")
    monkeypatch.setenv("HF_TOKEN", "hf_bob")  # who sees it, so that "creating" it succeeds
    outcome = run(*command, "alice/statistics")
    assert isinstance(outcome.exception, PushError)
    assert str(outcome.exception) == "Can't write to 'alice/statistics': this account may not write there."
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert "the Hub does not accept the token" in str(run(*command, "alice/statistics").exception)


def test_no_card_of_another_is_replaced(hub, online, tmp_path):
    """Neither of a model or an adapter in the folder, nor a text that somebody wrote; told before the pass, and before a repo is made."""
    command = ["fisher", "--model", "gone", "--dataset", "gone.jsonl", "--output-dir"]
    for name, reason in (
        ("adapter_config.json", "'{}' holds a model ('adapter_config.json'), whose card this would replace"),
        ("config.json", "'{}' holds a model ('config.json'), whose card this would replace"),
        ("notes.txt", "'{}/README.md' is no card of statistics, and this would replace it"),
    ):
        theirs = tmp_path / name
        theirs.mkdir()
        (theirs / name).write_text("{}")
        (theirs / "README.md").write_text("---\ntags: [lora]\n---\n# Mine\n")
        outcome = run(*command, str(theirs), "--push", "alice/x")
        assert str(outcome.exception) == f"{reason.format(theirs)}: name another `--output-dir`."
        assert (theirs / "README.md").read_text() == "---\ntags: [lora]\n---\n# Mine\n" and not hub.repos
        assert "gone.jsonl" in str(run(*command, str(theirs)).exception), "without a push no card is written"


def test_bad_arguments_are_a_sentence(folder):
    assert "`--bits` must be 4 or 8" in str(run("fisher", "--model", "x", "--dataset", "y", "--bits", "3").exception)
    embedded = ["fisher", "--model", "miniworld", "--dataset", "miniworld", "--output-dir", "unused"]
    assert "The embedded model is loaded as it is" in str(run(*embedded, "--bits", "4").exception)
    command = ["fisher", "--model", str(folder), "--dataset", "miniworld", "--output-dir", "unused"]
    assert str(run(*command, "--dtype", "foo").exception).startswith("There is no type 'foo'")
    assert str(run(*command, "--device-map", "nowhere").exception).startswith("Can't load the model")
    assert "Say where the statistics go" in str(run("fisher", "--model", "x", "--dataset", "y").exception)


def test_rows_of_a_file_leave_no_path(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    names = [str(tmp_path / "rows.jsonl"), str(tmp_path), "gone/rows.jsonl", "user/rows", "driftcaps"]
    assert [dataset_id(name) for name in names] == [None, None, None, "user/rows", "driftcaps"]


def test_a_model_of_a_folder_that_is_gone_has_no_name():
    model = tiny_model()
    for name in ("../base", "outputs/run/checkpoint-1", "/gone"):
        model.config.name_or_path = name
        assert describe_base(model)["name"] is None
