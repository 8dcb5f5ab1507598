"""Spaces on the Hub: made and updated in one commit, with variables, and a sentence where the Hub refuses."""

import os
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import HfApi, SpaceCard
from typer.testing import CliRunner

from agl_trl.artifacts.upload import PushError
from agl_trl.cli.app import app
from agl_trl.cli.space import deploy, write_space


SPACE = "alice/refusals"


def test_space_is_made_in_one_commit(hub, online):
    address = deploy(SPACE, base="alice/model", adapter="alice/adapter")
    repo = hub.repo(SPACE, "spaces")
    assert address == f"{hub.url}/spaces/{SPACE}" and repo.sdk == "gradio"
    assert repo.variables == {"BASE_MODEL": "alice/model", "ADAPTER": "alice/adapter"}
    commit, first = repo.history()
    assert first.title == "initial commit"
    assert {"app.py", "README.md", "requirements.txt", "agl_trl/space/app.py", "agl_trl/space/style.css"} <= {
        *commit.files
    }
    assert not any("__pycache__" in name or "checkpoints/base" in name or "aligned-" in name for name in commit.files)
    front = yaml.safe_load(commit.files["README.md"].data.decode().split("---")[1])
    assert front["sdk"] == "gradio" and front["models"] == ["alice/model", "alice/adapter"]
    assert len(front["short_description"]) <= 60 and SpaceCard.load(SPACE).data.app_file == "app.py"
    requirements = commit.files["requirements.txt"].data.decode()
    assert "torch>=2.8\n" in requirements and "==" not in requirements


def test_space_is_updated(hub, online):
    deploy(SPACE, base=None, adapter="alice/adapter")
    deploy(SPACE, base=None, adapter="alice/other")
    assert hub.repo(SPACE, "spaces").variables == {"ADAPTER": "alice/other"}
    deploy(SPACE, base=None, adapter=None)
    assert hub.repo(SPACE, "spaces").variables == {}
    assert len(hub.repo(SPACE, "spaces").history()) == 4


@pytest.mark.parametrize(
    ("status", "endpoint", "said"),
    [
        (402, "create", "free accounts may have ZeroGPU ones"),
        (403, "create", "may not write there"),
        (403, "variables", "may not write there"),
        (403, "commit", "may not write there"),
        (402, "commit", "paid plan"),
    ],
)
def test_refusals_of_the_hub_are_one_sentence(hub, online, status, endpoint, said):
    if endpoint != "create":
        HfApi().create_repo(SPACE, repo_type="space", space_sdk="gradio")
    hub.fail_next(status, match=endpoint)
    with pytest.raises(PushError) as error:
        deploy(SPACE, base=None, adapter="alice/adapter")
    assert said in str(error.value) and SPACE in str(error.value) and "\n" not in str(error.value)
    assert hub.token not in str(error.value) and error.value.status == status
    if endpoint != "create":
        assert len(hub.repo(SPACE, "spaces").history()) == 1


def test_a_space_of_somebody_else_is_refused(hub, online):
    with pytest.raises(PushError, match="may not write there"):
        deploy("bob/space", base=None, adapter="alice/adapter")


def test_what_a_space_could_not_read_is_refused_first(hub, online, tmp_path):
    with pytest.raises(ValueError, match="can't read"):
        deploy(SPACE, base="miniworld", adapter=str(tmp_path))
    with pytest.raises(ValueError, match="--adapter"):
        deploy(SPACE, base="alice/model", adapter=None)
    assert not hub.repos


def test_command(hub, online):
    arguments = ["space", "--push", SPACE, "--adapter", "alice/adapter", "--base", "miniworld", "--private"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and done.stdout.strip() == f"{hub.url}/spaces/{SPACE}", done.exception
    assert hub.repo(SPACE, "spaces").private
    assert hub.repo(SPACE, "spaces").variables == {"BASE_MODEL": "miniworld", "ADAPTER": "alice/adapter"}


def test_pushed_files_run_by_themselves(tmp_path):
    """As on the Hub: only the files of the commit, with what requirements.txt names."""
    write_space(tmp_path, [])
    code = "import agl_trl, app; print(agl_trl.__file__); print(len(app.app.blocks) > 20)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "SPACE_ID": "alice/space"
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [str(tmp_path / "agl_trl" / "__init__.py"), "True"], done.stderr
