"""Files are whole or refused with a reason, and the same bytes for the same content."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from agl_trl import DriftReport, FisherStatistics, estimate_fisher
from agl_trl.artifacts.files import (
    CHECKSUM,
    SCHEMA_VERSION,
    ArtifactError,
    canonical_json,
    check_writable,
    first_line,
    load_tensors,
    save_tensors,
    sha256,
    write_atomically,
)
from tests.helpers.models import adapted, tiny_model
from tests.helpers.processes import ROOT


TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.arange(4).bfloat16(),
    "flags": torch.tensor([True, False]),
    "scalar": torch.tensor(7),
    "columns": torch.arange(6.0).reshape(2, 3).T,
    "empty": torch.zeros(0, 3),
}
METADATA = {"kind": "test", "numbers": [1, 2.5, None], "name": "Zürich, 東京"}


def test_tensors_and_metadata_survive_the_round_trip(tmp_path):
    path = tmp_path / "new" / "folder" / "file.safetensors"
    save_tensors(path, TENSORS, METADATA)
    tensors, metadata = load_tensors(path)
    assert metadata == METADATA | {"schema_version": SCHEMA_VERSION} and tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    assert [entry.name for entry in path.parent.iterdir()] == [path.name] and path.stat().st_mode & 0o777 == 0o644
    path.write_bytes(b"")
    assert torch.equal(tensors["b"], TENSORS["b"]), "what was read is not mapped from the file"


def test_bytes_depend_on_the_content_alone(tmp_path):
    for name, tensors, metadata in (
        ("one", TENSORS, METADATA),
        ("other", dict(reversed(TENSORS.items())), dict(reversed(METADATA.items()))),
    ):
        save_tensors(tmp_path / name, tensors, metadata)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    save_tensors(tmp_path / "third", TENSORS, METADATA | {"name": "Zurich"})
    assert sha256(tmp_path / "third") != sha256(tmp_path / "one") == sha256(tmp_path / "other")


def test_what_was_not_written_by_us_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(ArtifactError, match="There is no file"):
        load_tensors(tmp_path / "none.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(ArtifactError, match="was not written by agl_trl"):
        load_tensors(foreign)
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        load_tensors(tmp_path / "pickle.safetensors")
    save_tensors(tmp_path / "other.safetensors", TENSORS, METADATA)
    for reader, kind in ((FisherStatistics, "Fisher statistics"), (DriftReport, "drift report")):
        with pytest.raises(ArtifactError, match=f"holds no {kind}"):
            reader.from_pretrained(tmp_path / "other.safetensors")


@pytest.mark.parametrize("version", [0, -1, SCHEMA_VERSION + 1, 99, True, 1.0, "1", None])
def test_version_that_is_not_ours_is_named(version, tmp_path):
    path = tmp_path / "bad.safetensors"
    save_file(TENSORS | {"columns": torch.ones(1)}, path, {"agl": canonical_json({"schema_version": version})})
    sentence = f"has schema version {version!r}; this agl_trl reads up to {SCHEMA_VERSION}: upgrade it"
    with pytest.raises(ArtifactError, match=sentence):
        load_tensors(path)


def test_content_is_checked_and_early_files_without_a_checksum_are_read(tmp_path):
    path = tmp_path / "file.safetensors"
    save_tensors(path, TENSORS, METADATA)
    with safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["agl"] and len(json.loads(file.metadata()["agl"])[CHECKSUM]) == 64
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="is damaged: its content is not what was written; get it again"):
        load_tensors(tmp_path / "bad.safetensors")
    tensors, metadata = load_tensors(path)
    save_file(tensors, tmp_path / "early.safetensors", {"agl": canonical_json(metadata | {"schema_version": 1})})
    early, read = load_tensors(tmp_path / "early.safetensors")
    assert read == metadata | {"schema_version": 1} and all(torch.equal(early[name], t) for name, t in tensors.items())


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from agl_trl.artifacts.files import save_tensors, write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (lambda path: save_tensors(path, {"a": torch.ones(9999)}, {}), lambda path: write_atomically(path, bytes(9999))):
    try:
        write(Path(sys.argv[1]))
    except OSError as error:
        print(error)
"""


def test_failed_write_leaves_the_previous_file_and_nothing_else(tmp_path):
    """A disk that takes no more than 4 kB: one sentence, the old file whole, no temporary file."""
    path = tmp_path / "file"
    write_atomically(path, b"good")
    command = [sys.executable, "-c", FULL_DISK, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    lines = run.stdout.splitlines()
    assert len(lines) == 2 and all(f"Cannot write '{path}': " in line for line in lines)
    assert path.read_bytes() == b"good" and os.listdir(tmp_path) == ["file"]
    for write in (lambda: save_tensors(path / "below", TENSORS, {}), lambda: write_atomically(path / "below", b"")):
        with pytest.raises(OSError, match="Cannot write .*below"):
            write()
    assert path.read_bytes() == b"good"


def test_checkpoint_whose_adapter_or_report_was_exchanged_is_not_resumed(tokenizer, alignment_rows, tmp_path):
    from agl_trl.trainer.resume import checkpoint_state

    statistics = estimate_fisher(tiny_model(), alignment_rows, tokenizer, progress=False)
    model = adapted(0.1)
    model.save_pretrained(tmp_path)
    report = DriftReport.measure(model, statistics)
    report.adapter_sha256, report.budget_multiplier = sha256(tmp_path / "adapter_model.safetensors"), 0.5
    path = report.save_pretrained(tmp_path)
    assert checkpoint_state(str(tmp_path), model)[1].multiplier == 0.5
    adapted(0.2).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="The report is of another adapter"):
        checkpoint_state(str(tmp_path), model)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        checkpoint_state(str(tmp_path), model)
    path.unlink()
    assert checkpoint_state(str(tmp_path), model)[1].multiplier == 0.0


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
