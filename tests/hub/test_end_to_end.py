"""An owner publishes statistics, a trainee in two processes uses them without a row of safety data, a reader checks it all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from agl_trl.miniworld import checkpoint_path
from tests.helpers.hub_commits import agreeing_folders
from tests.helpers.hub_fixtures import hub_environment
from tests.helpers.processes import COMMON as TWO
from tests.helpers.processes import ROOT, free_port


READER = """
import json
from peft import PeftModel
from transformers import AutoModelForCausalLM
from agl_trl import DriftReport, FisherStatistics
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("alice/base"), "alice/tuned")
statistics = FisherStatistics.from_pretrained("alice/tuned")
report = DriftReport.from_pretrained("alice/tuned")
print(json.dumps({
    "found": list(statistics.relative_drift(model).values()), "told": report.relative_drift.tolist(), "step": report.global_step,
    "protected": report.metadata["protected"],
    "base": report.metadata["base_model"], "published": statistics.metadata,
    "owner": FisherStatistics.from_pretrained("alice/base-agl-fisher").metadata,
}))
"""


def start(hub, home: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess:
    environment = hub_environment(hub, home) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CI": "1"}
    return subprocess.run(
        [sys.executable, *command], check=False, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def test_from_owner_to_trainee_to_reader(hub, online, tmp_path):
    online.create_repo("alice/base")
    base = online.upload_folder(repo_id="alice/base", folder_path=checkpoint_path("aligned"))

    owner = start(
        *(
            hub,
            tmp_path / "owner",
            tmp_path,
            "-m",
            "agl_trl",
            "fisher",
            "--model",
            "alice/base",
            "--dataset",
            "miniworld",
        ),
        *("--push", "alice/base-agl-fisher"),
    )
    assert owner.returncode == 0, owner.stderr[-2000:]
    assert set(hub.repo("alice/base-agl-fisher").history()[0].files) == {
        ".gitattributes",
        "README.md",
        "agl/fisher.safetensors",
        "agl/reference_answers.safetensors",
    }

    config = yaml.safe_load((ROOT / "examples" / "configs" / "miniworld_sft.yaml").read_text())
    del config["alignment_dataset_name"]
    config |= dict(model_name_or_path="alice/base", fisher_path="alice/base-agl-fisher", max_steps=6, warmup_steps=1)
    config |= dict(save_strategy="steps", save_steps=2, hub_strategy="every_save", hub_always_push=True)
    config |= dict(push_to_hub=True, hub_model_id="alice/tuned", output_dir=str(tmp_path / "run"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(TWO))
    trainee = start(
        *(
            hub,
            tmp_path / "trainee",
            tmp_path,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(tmp_path / "two.yaml"),
        ),
        *(
            "--main_process_port",
            str(free_port()),
            "-m",
            "agl_trl.scripts.sft",
            "--config",
            str(tmp_path / "run.yaml"),
        ),
    )
    assert trainee.returncode == 0, trainee.stderr[-3000:]

    history = hub.repo("alice/tuned").history()
    steps = [agreeing_folders(commit, tmp_path / "scratch")[""] for commit in history[::-1][1:]]
    assert steps[:3] == [2, 4, 6] and steps[-1] == 6
    for file in ("agl/fisher.safetensors", "agl/reference_answers.safetensors"):  # the owner's, byte by byte
        published = hub.repo("alice/base-agl-fisher").history()[0].files[file]
        assert all(commit.files[file].sha256 == published.sha256 for commit in history[:-1])
    card = history[0].files["README.md"].data.decode()
    assert "base_model: alice/base" in card and "relative_drift" in card and str(tmp_path) not in card

    reader = start(hub, tmp_path / "reader", tmp_path, "-c", READER)
    assert reader.returncode == 0, reader.stderr[-2000:]
    seen = json.loads(reader.stdout.splitlines()[-1])
    assert seen["found"] == pytest.approx(seen["told"], rel=1e-4) and seen["step"] == 6
    kept = seen["protected"]["behaviours"]["alignment"]
    assert kept["rows"] == 128 and 0 < kept["kl"] <= kept["budget"] == 0.02
    assert f"| alignment | 128 | {kept['kl']:.2e} |" in card
    assert seen["base"]["name"] == "alice/base" and seen["base"]["revision"] == base.oid
    assert seen["published"] == seen["owner"] and seen["owner"]["dataset"] == "miniworld"

    # Nothing that was sent or printed holds the token, in any repo, log or card.
    token = hub.token.encode()
    for repo in hub.repos.values():
        for commit in repo.commits.values():
            assert not any(token in blob.data for blob in commit.files.values())
    for done in (owner, trainee, reader):
        assert hub.token not in done.stdout + done.stderr
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or token not in path.read_bytes(), path
