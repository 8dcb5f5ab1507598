"""Statistics, reports and adapters by Hub id: the real client over real HTTP, and one sentence for every way to fail."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

from agl_trl import DriftReport, FisherStatistics
from agl_trl.artifacts.files import ArtifactError, sha256, write_atomically
from agl_trl.artifacts.location import adapter_folder, find_artifact, hub_id, shown_name


@pytest.fixture
def published(online, demo_folder):
    """The demo's folder as a repo."""
    api = HfApi()
    api.create_repo("alice/demo", exist_ok=True)
    commit = api.upload_folder(
        repo_id="alice/demo", folder_path=demo_folder, ignore_patterns=["lora/*", "*.bin"], commit_message="demo"
    )
    return commit.oid


def test_evidence_is_read_by_id_revision_and_from_the_cache(published, online, demo_folder):
    local = FisherStatistics.from_pretrained(demo_folder)
    by_id = FisherStatistics.from_pretrained("alice/demo")
    by_revision = FisherStatistics.from_pretrained("alice/demo", revision=published)
    for name, X in local.inputs.items():
        assert torch.equal(X.eigenvalues, by_id.inputs[name].eigenvalues)
        assert torch.equal(X.eigenvalues, by_revision.inputs[name].eigenvalues)
    report = DriftReport.from_pretrained("alice/demo")
    folder = adapter_folder("alice/demo")
    assert report.adapter_sha256 == sha256(folder / "adapter_model.safetensors")
    assert not list(folder.glob("*.bin")) and (folder / "agl" / "fisher.safetensors").is_file()


def test_private_evidence_is_read_with_a_token(online, demo_folder):
    """Alice is logged in; what is bob's alone is read by his token, and by it only."""
    api = HfApi(token="hf_bob")
    api.create_repo("bob/hidden", private=True)
    api.upload_folder(repo_id="bob/hidden", folder_path=demo_folder, allow_patterns="agl/*", commit_message="hidden")
    for artifact in (FisherStatistics, DriftReport):
        with pytest.raises(ArtifactError, match="Can't read 'bob/hidden': there is no such folder, and no such repo"):
            artifact.from_pretrained("bob/hidden")
        assert artifact.from_pretrained("bob/hidden", token="hf_bob").metadata["base_model"]


def test_failures_are_one_sentence(published, online, hub, tmp_path):
    for location, revision, sentence in (
        ("alice/nothing", None, "Can't read 'alice/nothing': there is no such folder, and no such repo on the Hub"),
        ("alice/demo", "v9", "'alice/demo' has no revision 'v9'"),
    ):
        with pytest.raises(ArtifactError, match=sentence) as failed:
            FisherStatistics.from_pretrained(location, revision=revision)
        assert str(failed.value).count("\n") == 0
    HfApi().create_repo("alice/empty", exist_ok=True)
    with pytest.raises(ArtifactError, match="'alice/empty' has no file 'agl/fisher.safetensors'"):
        FisherStatistics.from_pretrained("alice/empty")
    with pytest.raises(ArtifactError, match="There is no adapter in 'alice/empty'"):
        adapter_folder("alice/empty")
    (tmp_path / "alice").mkdir()
    shutil.rmtree(tmp_path / "alice")
    with pytest.raises(ArtifactError, match="Found no 'agl/fisher.safetensors' in 'no such folder'"):
        FisherStatistics.from_pretrained("no such folder")


def test_artifact_is_found_by_file_folder_and_adapter(tmp_path):
    path = tmp_path / "adapter" / "agl" / "fisher.safetensors"
    write_atomically(path, b"")
    for location in (path, path.parent, tmp_path / "adapter"):
        assert find_artifact(location, "fisher.safetensors") == path
    for location in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArtifactError) as failed:
            find_artifact(location, "fisher.safetensors")
        assert str(failed.value) == f"Found no 'agl/fisher.safetensors' in '{location}'."


def test_ids_of_the_hub_are_told_from_paths_and_from_nothing():
    for name in ("user/name", "gpt2", "a-b/c_d.e", "1/2"):
        assert hub_id(name) == name
    assert hub_id("gpt2", with_owner=True) is None and hub_id("user/name", with_owner=True) == "user/name"
    paths = ("/x/y", "./x", "../x/y", "a/b/c", "a/b/", "C:\\a", "a b/c", "é/x", "a..b/c", "a--b/c", "x/y.git")
    for name in (*paths, "", "a" * 5000, f"{'a' * 5000}/b", "x/y\n", "x/y\0", None, 7, Path("user/name")):
        assert hub_id(name) is None and hub_id(name, with_owner=True) is None, name


def test_a_report_tells_no_folder_of_a_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "rows.jsonl").write_text("")
    assert shown_name(str(tmp_path / "adapter")) == shown_name("adapter/") == "adapter"
    assert shown_name(".") == tmp_path.name and shown_name(str(tmp_path / "rows.jsonl")) == "rows.jsonl"
    assert shown_name("user/name") == "user/name", "of the Hub"
