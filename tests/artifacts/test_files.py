"""Files are whole or refused with a reason, and the same bytes for the same content."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from agl_trl import DriftReport, FisherStatistics, estimate_fisher
from agl_trl.artifacts.files import (
    SCHEMA_VERSION,
    ArtifactError,
    canonical_json,
    check_writable,
    first_line,
    hub_id,
    load_tensors,
    save_tensors,
    sha256,
)
from agl_trl.modeling.lora import linear_layers
from agl_trl.trainer.resume import checkpoint_state
from tests.helpers.models import adapted, tiny_model


@pytest.fixture(scope="module")
def statistics(tokenizer, alignment_rows) -> FisherStatistics:
    return estimate_fisher(tiny_model(), alignment_rows, tokenizer, shrinkage=0.5, progress=False)


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


def test_estimating_twice_gives_the_same_bytes(statistics, tokenizer, alignment_rows, tmp_path):
    twin = estimate_fisher(tiny_model(), alignment_rows, tokenizer, shrinkage=0.5, progress=False)
    assert twin.save_pretrained(tmp_path / "a").read_bytes() == statistics.save_pretrained(tmp_path / "b").read_bytes()


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
        metadata["schema_version"] == SCHEMA_VERSION and metadata["kind"] == "fisher" and metadata["shrinkage"] == 0.5
    )
    assert metadata["base_model"]["config"]["hidden_size"] == 32 and metadata["base_model"]["name"] is None


def test_unreadable_files_are_refused_with_a_sentence(statistics, tmp_path):
    with pytest.raises(ArtifactError, match="Found no 'agl/fisher.safetensors' in"):
        FisherStatistics.from_pretrained(tmp_path)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(ArtifactError, match="was not written by agl_trl"):
        FisherStatistics.from_pretrained(foreign)
    newer = tmp_path / "newer.safetensors"
    save_file({"a": torch.zeros(1)}, newer, metadata={"agl": '{"schema_version": 99, "kind": "fisher"}'})
    with pytest.raises(ArtifactError, match="schema version 99"):
        FisherStatistics.from_pretrained(newer)
    with pytest.raises(ArtifactError, match="holds no drift report"):
        DriftReport.from_pretrained(statistics.save_pretrained(tmp_path))
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        FisherStatistics.from_pretrained(tmp_path / "pickle.safetensors")


def test_corrupted_bytes_never_crash(statistics, tmp_path):
    """Truncated and flipped files: refused, or (a flip inside tensor data) loaded whole and finite."""
    good = statistics.save_pretrained(tmp_path).read_bytes()
    header = int.from_bytes(good[:8], "little") + 8
    draw = random.Random(0)
    path = tmp_path / "bad.safetensors"
    for _ in range(30):
        path.write_bytes(good[: draw.randrange(len(good))])
        with pytest.raises(ArtifactError):
            FisherStatistics.from_pretrained(path)
    refused = 0
    for _ in range(60):
        bad = bytearray(good)
        bad[draw.randrange(header)] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(bad))
        try:
            FisherStatistics.from_pretrained(path)
        except ArtifactError:
            refused += 1
    assert refused > 30


def test_missing_tensors_and_wrong_shapes_are_named(statistics, tmp_path):
    tensors, metadata = load_tensors(statistics.save_pretrained(tmp_path))
    key = "inputs.model.layers.0.self_attn.q_proj.eigenvalues"
    for change, message in (
        ({key: tensors[key][:-1]}, "have shapes"),
        ({key: tensors[key] * torch.nan}, "not finite"),
        ({key: None}, "incomplete or malformed"),
    ):
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_tensors(tmp_path / "bad.safetensors", changed, metadata)
        with pytest.raises(ArtifactError, match=message):
            FisherStatistics.from_pretrained(tmp_path / "bad.safetensors")


FULL_DISK = """
import resource, sys
from agl_trl import FisherStatistics
statistics = FisherStatistics.from_pretrained(sys.argv[1])
statistics.metadata["seed"] = 1
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    statistics.save_pretrained(sys.argv[1])
except OSError as error:
    print(error)
"""


def test_failed_write_leaves_the_previous_file_and_nothing_else(statistics, tmp_path):
    """A disk that takes no more than 4 kB: one sentence, the old file whole, no temporary file."""
    path = statistics.save_pretrained(tmp_path)
    good = path.read_bytes()
    run = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=True)
    assert f"Cannot write '{path}'" in run.stdout and run.stdout.count("\n") == 1
    assert path.read_bytes() == good and [p.name for p in path.parent.iterdir()] == ["fisher.safetensors"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Cannot write"):
        statistics.save_pretrained(tmp_path / "file")


def test_report_of_another_adapter_is_told(statistics, tmp_path):
    model = adapted(0.1)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    report = DriftReport.measure(model, statistics)
    with pytest.raises(ArtifactError, match="the report names no sha256"):
        report.check_describes(tmp_path)
    report.adapter_sha256, report.global_step = sha256(file), 40
    report.check_describes(tmp_path)
    report.check_describes(file)
    loaded = DriftReport.from_pretrained(report.save_pretrained(tmp_path))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # still a finite number
    file.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        loaded.check_describes(tmp_path)
    assert str(caught.value) == (
        f"The report is of another adapter: its sha256 starts with {report.adapter_sha256[:12]} (step 40), that of "
        f"'{file}' with {sha256(file)[:12]}."
    )
    with pytest.raises(ArtifactError, match="there is no such file"):
        loaded.check_describes(tmp_path / "nowhere")


def test_checkpoint_whose_adapter_or_report_was_exchanged_is_not_resumed(statistics, tmp_path):
    model = adapted(0.1)
    model.save_pretrained(tmp_path)
    report = DriftReport.measure(model, statistics)
    report.adapter_sha256, report.budget_multiplier = sha256(tmp_path / "adapter_model.safetensors"), 0.5
    path = report.save_pretrained(tmp_path)
    assert checkpoint_state(str(tmp_path), model)[1] == 0.5
    adapted(0.2).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="The report is of another adapter"):
        checkpoint_state(str(tmp_path), model)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        checkpoint_state(str(tmp_path), model)
    path.unlink()
    assert checkpoint_state(str(tmp_path), model)[1] == 0.0


def test_content_is_checked_and_early_files_are_read(statistics, tmp_path):
    path = statistics.save_pretrained(tmp_path)
    with safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["agl"] and len(json.loads(file.metadata()["agl"])["content_sha256"]) == 64
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="is damaged: its content is not what was written"):
        FisherStatistics.from_pretrained(tmp_path / "bad.safetensors")
    tensors, metadata = load_tensors(path)
    save_file(tensors, tmp_path / "early.safetensors", metadata={"agl": canonical_json(metadata)})
    early = FisherStatistics.from_pretrained(tmp_path / "early.safetensors")
    (tmp_path / "early.safetensors").write_bytes(b"")  # the statistics in memory are not those of the file
    assert early.save_pretrained(tmp_path / "again").read_bytes() == path.read_bytes()


def test_version_and_base_model_that_differ_are_named(statistics, tmp_path):
    tensors, metadata = load_tensors(statistics.save_pretrained(tmp_path))
    path = tmp_path / "bad.safetensors"
    for version in (0, -1, SCHEMA_VERSION + 1, True, 1.0, "1", None):
        save_file(tensors, path, metadata={"agl": canonical_json(metadata | {"schema_version": version})})
        with pytest.raises(
            ArtifactError, match=f"has schema version {version!r}; this agl_trl reads up to {SCHEMA_VERSION}"
        ):
            FisherStatistics.from_pretrained(path)
    model = tiny_model(hidden_size=64)
    with pytest.raises(ArtifactError, match="of another base model: hidden_size is 32 there and 64 here"):
        statistics.check_fits(model, linear_layers(model))
    model = tiny_model("mistral")
    with pytest.raises(ArtifactError, match="of another base model: model_type is llama there and mistral here"):
        statistics.check_fits(model, linear_layers(model))
    model = tiny_model(seed=1)
    model.model.layers[0].mlp.up_proj.weight.data *= 2
    with pytest.raises(ArtifactError, match="of other weights: the norm of layer"):
        statistics.check_fits(model, linear_layers(model))


def test_ids_of_the_hub_are_told_from_paths_and_from_nothing():
    for name in ("user/name", "gpt2", "a-b/c_d.e", "1/2"):
        assert hub_id(name) == name
    assert hub_id("gpt2", with_owner=True) is None and hub_id("user/name", with_owner=True) == "user/name"
    paths = ("/x/y", "./x", "../x/y", "a/b/c", "a/b/", "C:\\a", "a b/c", "é/x", "a..b/c", "a--b/c", "x/y.git")
    for name in (*paths, "", "a" * 5000, f"{'a' * 5000}/b", "x/y\n", "x/y\0", None, 7, Path("user/name")):
        assert hub_id(name) is None and hub_id(name, with_owner=True) is None, name


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    assert not [*tmp_path.iterdir()]
    (tmp_path / "file").write_text("in the way")
    for folder, said in (
        ("file", "File exists"),
        ("file/a/b", "Not a directory"),
        ("a/" + "b" * 300, "File name too long"),
    ):
        with pytest.raises(OSError, match=said) as failed:
            check_writable(tmp_path / folder)
        assert failed.value.strerror == f"Cannot write to the folder '{tmp_path / folder}': {said}."
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_library_says_is_one_short_line():
    assert first_line(ValueError("\n  No such thing: here.\nDid you mean ...?")) == "No such thing: here"
    assert first_line(ValueError("What failed:\n- all")) == "What failed"
    assert first_line(StopIteration()) == "StopIteration" and first_line(ValueError("\n \n")) == "ValueError"
    assert len(first_line(ValueError("long " * 1000))) <= 160
