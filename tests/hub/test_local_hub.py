"""The local Hub and the real client over HTTP: what is pushed comes back, a refusal is the client's own error."""

import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
import torch
from datasets import Dataset, load_dataset
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    ModelCard,
    constants,
    hf_hub_download,
    snapshot_download,
    whoami,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from tests.helpers.hub_fixtures import hub_environment
from tests.helpers.hub_server import LocalHub
from tests.helpers.models import tiny_model


CARD = "---\nbase_model: alice/base\nlibrary_name: peft\nlicense: mit\n---\n# An adapter\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter's folder as this package writes it: 5 MB of weights, a card, files under agl/."""
    folder = tmp_path / "out"
    (folder / "agl").mkdir(parents=True)
    save_file({"w": torch.arange(1_250_000, dtype=torch.float32)}, folder / "adapter_model.safetensors")
    save_file({"f": torch.arange(10.0)}, folder / "agl" / "fisher.safetensors")
    (folder / "agl" / "drift.json").write_text('{"drift": 0.5}')
    (folder / "README.md").write_text(CARD)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and ".cache" not in p.parts
    }


def test_one_commit_holds_the_folder_and_comes_back_identical(
    hub: LocalHub, online: HfApi, folder: Path, tmp_path: Path
):
    assert online.create_repo("alice/adapter") == f"{hub.url}/alice/adapter"
    pushed = online.upload_folder(repo_id="alice/adapter", folder_path=folder, commit_message="Push")
    commit, first = hub.repo("alice/adapter").history()
    assert (commit.sha, commit.title, commit.author, first.title) == (pushed.oid, "Push", "alice", "initial commit")
    assert {path: blob.data for path, blob in commit.files.items() if path != ".gitattributes"} == contents(folder)
    lfs = ["adapter_model.safetensors", "agl/fisher.safetensors"]
    assert commit.uploads == dict.fromkeys(lfs, "lfs") | dict.fromkeys(["README.md", "agl/drift.json"], "regular")
    assert len(hub.calls("lfs-put")) == len(hub.calls("lfs-verify")) == 2 and len(hub.calls("commit")) == 1

    back = Path(snapshot_download("alice/adapter", local_dir=tmp_path / "back", ignore_patterns=".gitattributes"))
    assert contents(back) == contents(folder)
    assert contents(Path(snapshot_download("alice/adapter"))) == {p: b.data for p, b in commit.files.items()}
    assert sorted(online.list_repo_files("alice/adapter")) == sorted(commit.files)
    info = online.model_info("alice/adapter", files_metadata=True)
    assert (info.sha, info.library_name, info.card_data.base_model) == (pushed.oid, "peft", "alice/base")
    assert {s.rfilename: s.size for s in info.siblings} == {p: len(b.data) for p, b in commit.files.items()}
    header = online.parse_safetensors_file_metadata("alice/adapter", "adapter_model.safetensors")
    assert header.tensors["w"].shape == [1_250_000]
    entries = online.get_paths_info("alice/adapter", ["agl", "agl/drift.json", "nothing"])
    assert sorted(entry.path for entry in entries) == ["agl", "agl/drift.json"]
    tops = [entry.path for entry in online.list_repo_tree("alice/adapter")]
    assert tops == [".gitattributes", "README.md", "adapter_model.safetensors", "agl"]

    # Nothing changed: the client compares oids with preupload's answer, and makes no commit.
    assert online.upload_folder(repo_id="alice/adapter", folder_path=folder).oid == pushed.oid
    assert len(hub.repo("alice/adapter").history()) == 2


def test_history_and_revisions(hub: LocalHub, online: HfApi):
    online.create_repo("alice/adapter")
    push = dict(path_in_repo="a.txt", repo_id="alice/adapter")
    shas = [
        online.upload_file(path_or_fileobj=f"{i}".encode(), **push, commit_message=f"step {i}").oid for i in range(3)
    ]
    online.create_tag("alice/adapter", tag="v0", revision=shas[0])
    online.create_branch("alice/adapter", branch="try/one", revision=shas[1])
    online.upload_file(path_or_fileobj=b"branch", **push, revision="try/one")
    pull = online.upload_file(path_or_fileobj=b"pull", **push, create_pr=True)
    online.delete_file("a.txt", "alice/adapter", commit_message="gone")

    repo = hub.repo("alice/adapter")
    assert [c.title for c in repo.history()] == ["gone", "step 2", "step 1", "step 0", "initial commit"]
    assert [c.title for c in online.list_repo_commits("alice/adapter")] == [c.title for c in repo.history()]
    assert [repo.read("a.txt", sha) for sha in shas] == [b"0", b"1", b"2"] and "a.txt" not in repo.resolve().files
    for revision, text in {shas[1]: "1", "v0": "0", "try/one": "branch", pull.pr_revision: "pull"}.items():
        assert Path(hf_hub_download("alice/adapter", "a.txt", revision=revision)).read_text() == text
    refs = online.list_repo_refs("alice/adapter", include_pull_requests=True)
    assert [sorted(r.name for r in kind) for kind in (refs.branches, refs.tags)] == [["main", "try/one"], ["v0"]]
    assert [r.ref for r in refs.pull_requests] == [pull.pr_revision] == ["refs/pr/1"]
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("alice/adapter", "a.txt")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("alice/adapter", "a.txt", revision="nowhere")
    with pytest.raises(HfHubHTTPError, match="412"):  # a commit upon a head that is not the head any more
        operation = CommitOperationAdd("b.txt", b"")
        online.create_commit("alice/adapter", [operation], commit_message="late", parent_commit=shas[0])


def test_rights(hub: LocalHub, online: HfApi):
    assert (whoami()["name"], whoami(token="hf_bob")["name"]) == ("alice", "bob")
    bob, nobody = HfApi(token="hf_bob"), HfApi(token=False)
    for api, status in ((bob, 403), (nobody, 401), (HfApi(token="hf_expired"), 401)):
        with pytest.raises(HfHubHTTPError) as refused:
            api.create_repo("alice/adapter")
        assert refused.value.response.status_code == status
    online.create_repo("alice/adapter", private=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        online.create_repo("alice/adapter")
    assert online.create_repo("alice/adapter", exist_ok=True).repo_id == "alice/adapter"
    upload = dict(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="alice/adapter")
    online.upload_file(**upload)
    for api in (bob, nobody):  # a private repo does not exist for others
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("alice/adapter")

    online.update_repo_settings("alice/adapter", private=False, gated="auto")
    assert nobody.model_info("alice/adapter").gated == "auto"
    for token in ("hf_bob", False):
        with pytest.raises(GatedRepoError):
            hf_hub_download("alice/adapter", "a.txt", token=token)
    hub.repo("alice/adapter").granted.add("bob")
    assert Path(hf_hub_download("alice/adapter", "a.txt", token="hf_bob")).read_text() == "x"
    with pytest.raises(HfHubHTTPError, match="403"):
        bob.upload_file(**upload)
    with pytest.raises(ValueError, match="base_model"):
        ModelCard("---\nbase_model: /some/where/base model\n---\n").push_to_hub("alice/adapter")
    online.create_repo("alice/space", repo_type="space", space_sdk="gradio")
    assert hub.repo("alice/space", "spaces").sdk == "gradio"
    online.delete_repo("alice/adapter")
    assert not online.repo_exists("alice/adapter")


def test_adapter_and_dataset(hub: LocalHub, online: HfApi):
    tiny_model().push_to_hub("alice/base")
    base = type(tiny_model()).from_pretrained("alice/base")
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.push_to_hub("alice/adapter")
    files = hub.repo("alice/adapter").resolve().files
    assert files["adapter_model.safetensors"].lfs and not files["adapter_config.json"].lfs
    again = PeftModel.from_pretrained(tiny_model(seed=0), "alice/adapter")
    tokens = torch.arange(12).reshape(1, 12)
    assert torch.equal(model.eval()(tokens).logits, again.eval()(tokens).logits)

    rows = Dataset.from_dict({"prompt": ["one", "two"], "label": [0, 1]})
    rows.push_to_hub("alice/rows")
    assert load_dataset("alice/rows", split="train").to_list() == rows.to_list()
    target = dict(repo_id="alice/lines", repo_type="dataset")
    online.create_repo(**target)
    online.upload_file(path_or_fileobj=b'{"x": 1}\n', path_in_repo="rows.jsonl", **target)
    assert load_dataset("alice/lines", split="train").to_list() == [{"x": 1}]


@pytest.mark.parametrize(
    ("what", "error"),
    [
        (401, HfHubHTTPError),
        (403, HfHubHTTPError),
        (404, RepositoryNotFoundError),
        (409, HfHubHTTPError),
        (412, HfHubHTTPError),
        (429, HfHubHTTPError),
        (500, HfHubHTTPError),
        ("drop", httpx2.TransportError),
    ],
)
def test_a_failed_commit_is_the_clients_error_and_can_be_retried(
    hub: LocalHub, online: HfApi, folder: Path, what: int | str, error: type[Exception]
):
    online.create_repo("alice/adapter")
    hub.fail_next(what)
    with pytest.raises(error) as refused:  # the client does not repeat a commit
        online.upload_folder(repo_id="alice/adapter", folder_path=folder)
    if isinstance(what, int):
        assert refused.value.response.status_code == what
    assert [call.status for call in hub.calls("commit")] == [what if isinstance(what, int) else 0]
    assert len(hub.repo("alice/adapter").history()) == 1
    online.upload_folder(repo_id="alice/adapter", folder_path=folder)
    assert len(hub.repo("alice/adapter").history()) == 2 and len(hub.calls("lfs-put")) == 2  # no weights sent twice


def test_an_answer_lost_after_the_commit(hub: LocalHub, online: HfApi, folder: Path):
    online.create_repo("alice/adapter")
    hub.fail_next("drop", after=True)
    with pytest.raises(httpx2.TransportError):
        online.upload_folder(repo_id="alice/adapter", folder_path=folder)
    assert len(hub.repo("alice/adapter").history()) == 2
    online.upload_folder(repo_id="alice/adapter", folder_path=folder)  # finds nothing to do
    assert len(hub.repo("alice/adapter").history()) == 2


GET = "GET /.*/resolve/"


@pytest.mark.parametrize(
    ("match", "what"),
    # A download's GET is not repeated after a 500, only its HEAD: see the next test.
    [
        (match, what)
        for match in ("preupload", "lfs-put", GET)
        for what in (429, 500, "drop")
        if (match, what) != (GET, 500)
    ],
)
def test_the_client_retries_what_it_may(hub: LocalHub, online: HfApi, naps: list[float], match: str, what: int | str):
    online.create_repo("alice/adapter")
    hub.fail_next(what, times=2, match=match)
    online.upload_file(path_or_fileobj=b"\0\1\2", path_in_repo="a.bin", repo_id="alice/adapter")
    assert Path(hf_hub_download("alice/adapter", "a.bin")).read_bytes() == b"\0\1\2"
    assert len(naps) == 2 and sum(call.status == (0 if what == "drop" else what) for call in hub.log) == 2


def test_a_download_that_fails(hub: LocalHub, online: HfApi, naps: list[float]):
    """The client repeats a refused HEAD, then gives up with an error of its own; a dropped one it does not catch."""
    online.create_repo("alice/adapter")
    online.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="alice/adapter")
    hub.fail_next(500, times=99, match="resolve")
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("alice/adapter", "a.txt")
    assert sum(naps) == 23  # seconds a user would have waited
    hub.faults.clear()
    hub.fail_next(500, match=GET)
    with pytest.raises(HfHubHTTPError, match="500"):
        hf_hub_download("alice/adapter", "a.txt")
    hub.fail_next("drop", match="resolve")
    with pytest.raises(httpx2.RemoteProtocolError):
        hf_hub_download("alice/adapter", "a.txt")
    assert Path(hf_hub_download("alice/adapter", "a.txt")).read_text() == "x"


def test_slow_answers(hub: LocalHub, online: HfApi):
    online.create_repo("alice/adapter")
    hub.fail_next("slow", seconds=0.3)
    start = time.monotonic()
    online.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="alice/adapter")  # no time limit on commits
    assert time.monotonic() - start > 0.3
    hub.fail_next("slow", match="info", seconds=0.3)
    with pytest.raises(httpx2.ReadTimeout):
        online.model_info("alice/adapter", timeout=0.05)
    assert online.model_info("alice/adapter", timeout=5).sha == hub.repo("alice/adapter").resolve().sha
    hub.fail_next("slow", match="resolve", seconds=0.3)  # the client asks again with more patience
    assert Path(hf_hub_download("alice/adapter", "a.txt", etag_timeout=0.05)).read_text() == "x"


def python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=60)


def test_subprocesses_and_the_server_alone(hub: LocalHub, tmp_path: Path):
    """A subprocess with `hub_environment` needs nothing else; and this process is offline when a test does not ask."""
    code = (
        "import huggingface_hub as h; h.create_repo('alice/x');"
        "h.upload_file(path_or_fileobj=b'1', path_in_repo='a', repo_id='alice/x');"
        "print(h.hf_hub_download('alice/x', 'a'))"
    )
    home = tmp_path / "home"
    done = python(code, hub_environment(hub, home))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(home) and hub.repo("alice/x").read("a") == b"1"
    done = python(code, hub_environment(hub, home, token=""))
    assert done.returncode and "401" in done.stderr

    assert constants.HF_HUB_OFFLINE and constants.ENDPOINT == "https://huggingface.co"
    with pytest.raises(OfflineModeIsEnabled):
        HfApi(endpoint=hub.url).model_info("alice/x")

    with subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.hub_server"], stdout=subprocess.PIPE, text=True
    ) as alone:
        try:
            url = alone.stdout.readline().split()[0]
            answer = httpx2.get(f"{url}/api/whoami-v2", headers={"authorization": "Bearer hf_alice"}, trust_env=False)
            assert answer.json()["name"] == "alice"
        finally:
            alone.terminate()
