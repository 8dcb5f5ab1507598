"""`push_to_hub` of statistics, reference answers and reports: the arguments of transformers, over real HTTP."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

from agl_trl import DriftReport, FisherStatistics, estimate_fisher
from agl_trl.artifacts.upload import PushError
from agl_trl.data.alignment import select_rows
from agl_trl.fisher.protected_rows import reference_answers
from tests.helpers.hub_fixtures import hub_environment
from tests.helpers.hub_server import LocalHub
from tests.helpers.models import tiny_model
from tests.helpers.reports import behaviour_by_hand, report_by_hand


FISHER, DRIFT, ANSWERS, PICTURE = (
    f"agl/{name}" for name in ("fisher.safetensors", "drift.safetensors", "reference_answers.safetensors", "drift.png")
)


@pytest.fixture(scope="module")
def statistics(tokenizer, alignment_rows) -> FisherStatistics:
    return estimate_fisher(tiny_model(), alignment_rows, tokenizer, rank=4)


def test_statistics_come_back_from_a_private_repo_and_alone(hub, online, statistics):
    pushed = statistics.push_to_hub("statistics", private=True, commit_message="Of the aligned model")
    repo = hub.repo("alice/statistics")
    commit, _ = repo.history()
    assert (pushed.oid, commit.title, repo.private) == (commit.sha, "Of the aligned model", True)
    assert {*commit.files} == {".gitattributes", FISHER} and len(hub.calls("commit")) == 1
    back = FisherStatistics.from_pretrained("alice/statistics")
    assert back.num_tokens == statistics.num_tokens and back.metadata == statistics.metadata
    for name, X in statistics.inputs.items():
        assert torch.equal(X.eigenvectors, back.inputs[name].eigenvectors)

    assert statistics.push_to_hub("alice/statistics").oid == commit.sha, "the same bytes are no second commit"
    assert len(repo.history()) == 2


def test_a_branch_is_made_and_the_main_one_left(hub, online, statistics):
    statistics.push_to_hub("alice/statistics", revision="try/one")
    repo = hub.repo("alice/statistics")
    assert FISHER in repo.resolve("try/one").files and FISHER not in repo.resolve().files
    statistics.push_to_hub("alice/statistics", revision="try/one")  # which is there by now
    assert FisherStatistics.from_pretrained("alice/statistics", revision="try/one").num_tokens == statistics.num_tokens
    assert [commit.title for commit in repo.history("try/one")] == ["Upload FisherStatistics", "initial commit"]


def test_a_pull_request_of_somebody_else(hub, online, statistics):
    statistics.push_to_hub("alice/statistics")
    pull = report_by_hand().push_to_hub("alice/statistics", create_pr=True, token="hf_bob", commit_description="why")
    repo = hub.repo("alice/statistics")
    assert DRIFT not in repo.resolve().files and {DRIFT, FISHER} <= {*repo.resolve(pull.pr_revision).files}
    assert repo.resolve(pull.pr_revision).author == "bob"
    assert DriftReport.from_pretrained("alice/statistics", revision=pull.pr_revision).layers == report_by_hand().layers


def test_what_told_of_the_replaced_file_leaves_with_it(hub, online, statistics, tokenizer, alignment_rows):
    kinds = {"alignment/refuse": select_rows(alignment_rows, 4, 0)}
    references = reference_answers(tiny_model(), tokenizer, kinds, max_length=64)
    statistics.push_to_hub("alice/model")
    references.push_to_hub("alice/model")
    online.upload_file(path_or_fileobj=b"a picture", path_in_repo=PICTURE, repo_id="alice/model")
    repo = hub.repo("alice/model")
    statistics.push_to_hub("alice/model")  # unchanged: they still belong together
    assert {FISHER, ANSWERS, PICTURE} <= {*repo.resolve().files}

    statistics.metadata["seed"] = 99
    statistics.push_to_hub("alice/model")
    assert {*repo.resolve().files} == {".gitattributes", FISHER, PICTURE}
    report_by_hand().push_to_hub("alice/model")
    assert {*repo.resolve().files} == {".gitattributes", FISHER, DRIFT}


def test_a_report_of_another_adapter_is_refused(hub, online, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"another adapter")
    online.create_repo("alice/adapter")
    online.upload_folder(repo_id="alice/adapter", folder_path=tmp_path)
    before = hub.repo("alice/adapter").history()
    with pytest.raises(PushError, match="^The report is of another adapter than the repo's \\(sha256 abababab…"):
        report_by_hand().push_to_hub("alice/adapter")
    assert hub.repo("alice/adapter").history() == before


@pytest.mark.parametrize(
    ("repo", "token", "sentence"),
    [
        ("bob/x", None, "Can't create 'bob/x': this account may not write there."),
        (
            "alice/x",
            "hf_nobody",
            "Can't create 'alice/x': the Hub does not accept the token: log in with `hf auth login`.",
        ),
        ("alice/x y", None, "Can't create 'alice/x y': Repo id must"),
    ],
)
def test_refusals_are_a_sentence_without_the_token(repo, token, sentence, hub, online):
    with pytest.raises(PushError) as failed:
        report_by_hand().push_to_hub(repo, token=token)
    assert str(failed.value).startswith(sentence) and "\n" not in str(failed.value)
    assert "hf_nobody" not in str(failed.value) and not hub.calls("commit")


def test_a_report_that_cant_be_saved_makes_no_repo(hub, online):
    report = report_by_hand()
    report.relative_drift[0] = torch.nan
    with pytest.raises(ValueError, match="The run has diverged"):
        report.push_to_hub("alice/diverged")
    assert ("models", "alice/diverged") not in hub.repos


PROGRAM = """
import json, sys
from agl_trl import DriftReport
from agl_trl.artifacts.files import ArtifactError
from agl_trl.artifacts.upload import PushError

folder, wanted, absent = sys.argv[1:]
said = {}
try:
    said["pushed"] = DriftReport.from_pretrained(folder).push_to_hub(wanted).commit_url
except PushError as error:
    said["push"] = str(error)
for repo in (wanted, absent):
    try:
        said[repo] = DriftReport.from_pretrained(repo).behaviour.categories
    except ArtifactError as error:
        said[repo] = str(error)
print(json.dumps(said))
"""


def test_variables_of_the_environment_say_where_who_and_whether(hub: LocalHub, online: HfApi, tmp_path: Path):
    """`HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE`, which are read when a process starts."""
    report_by_hand(behaviour_by_hand()).save_pretrained(tmp_path / "report")
    arguments = [sys.executable, "-c", PROGRAM, tmp_path / "report", "bob/report", "bob/absent"]

    def run(**variables: str) -> dict[str, str]:
        settings = hub_environment(hub, tmp_path / "home", token="hf_bob") | variables
        done = subprocess.run(arguments, env=settings, capture_output=True, text=True, check=True)
        assert "hf_bob" not in done.stdout + done.stderr
        return json.loads(done.stdout)

    said = run()
    commit = hub.repo("bob/report").history()[0]
    assert commit.author == "bob" and said["pushed"] == f"{hub.url}/bob/report/commit/{commit.sha}"
    categories = behaviour_by_hand().categories
    assert said["bob/report"] == categories and "no such repo on the Hub" in said["bob/absent"]

    requests = len(hub.log)
    said = run(HF_HUB_OFFLINE="1")
    assert said["push"] == "Can't create 'bob/report': offline mode is on (HF_HUB_OFFLINE)."
    assert said["bob/report"] == categories, "what was read before is in the cache"
    assert "it isn't in the cache, and the Hub can't be reached" in said["bob/absent"]
    assert len(hub.log) == requests, "nothing was asked"
