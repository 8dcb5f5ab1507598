"""`agl-trl attach`: an adapter trained elsewhere gets its evidence, in its folder or in the commit after the one measured."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PromptTuningConfig
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from agl_trl import DriftReport
from agl_trl.artifacts.location import adapter_folder
from agl_trl.cli.app import app
from agl_trl.miniworld import checkpoint_path
from agl_trl.miniworld import load_model as load_miniworld
from agl_trl.modeling.generation import generate_answers
from agl_trl.modeling.loading import load_adapter, load_model
from agl_trl.space.models import Models
from tests.helpers.hub_commits import agreeing_folders
from tests.helpers.models import byte_tokenizer, moved_adapter, moved_by, tiny_model


@pytest.fixture
def elsewhere(online, demo_folder, tmp_path) -> Path:
    """The demo's plain LoRA adapter, as someone without agl_trl would have it."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((demo_folder / "lora" / name).read_bytes())
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Bob's adapter\n")
    return folder


def attach(*arguments: str):
    return CliRunner().invoke(
        app, ["attach", "--base", "miniworld", "--prompts", "miniworld", "--limit", "24", *arguments]
    )


def test_attach_to_a_folder_then_push(hub, online, elsewhere, demo_folder):
    outcome = attach(str(elsewhere), "--fisher", str(demo_folder))
    assert outcome.exit_code == 0, outcome.exception
    assert f"`agl-trl push {elsewhere} USER/NAME`" in outcome.output
    outcome = CliRunner().invoke(app, ["push", str(elsewhere), "alice/measured"])
    assert outcome.exit_code == 0, outcome.exception
    (commit, *_) = hub.repo("alice/measured").history()
    assert agreeing_folders(commit, elsewhere.parent / "scratch") == {"": None}
    assert "answers.jsonl" not in commit.files, "answers may say what nobody should read"
    card = commit.files["README.md"].data.decode()
    assert "# Bob's adapter" in card and "license: mit" in card and "refusal_rate" in card
    assert str(elsewhere) not in card
    assert (demo_folder / "agl" / "reference_answers.safetensors").is_file()
    assert "agl/reference_answers.safetensors" not in commit.files, "this adapter was not held to them"


def test_what_a_training_measured_stays(demo_folder, tmp_path):
    """Its budget, the KL on its protected rows and its history can't be measured afterwards."""
    folder = tmp_path / "trained"
    shutil.copytree(demo_folder, folder, ignore=shutil.ignore_patterns("lora", "README.md", "checkpoint*"))
    before = DriftReport.from_pretrained(folder)
    assert before.metadata["protected"]["behaviours"] and before.history and before.behaviour is not None
    for asked in (12, 6):  # also of a report that was attached
        outcome = attach(str(folder), "--limit", str(asked))
        assert outcome.exit_code == 0, outcome.exception
        report = DriftReport.from_pretrained(folder)
        assert len(report.behaviour.unsafe) == asked
        assert (
            report.metadata["protected"] == before.metadata["protected"] and report.global_step == before.global_step
        )
        assert report.metadata["coefficients"] == before.metadata["coefficients"]
        assert all(torch.equal(report.history[name], values) for name, values in before.history.items())
    card = (folder / "README.md").read_text()
    assert "KL to the base model in nats per answer token" in card and "agl/reference_answers.safetensors" in card
    changed = folder / "adapter_model.safetensors"
    tensors = load_file(changed)
    save_file({name: 2 * values for name, values in tensors.items()}, changed)
    assert attach(str(folder), "--limit", "6").exit_code == 0
    other = DriftReport.from_pretrained(folder)
    assert "protected" not in other.metadata and not other.history, "it is of another adapter"


def test_what_is_not_beside_the_card_is_not_told(hub, online, demo_folder, tmp_path, monkeypatch):
    """
    The owner withheld the statistics: others are estimated and not kept, in whose metric the history and the budget of the training are
    not. And there is no picture without matplotlib.
    """
    folder = tmp_path / "withheld"
    private = ("fisher.safetensors", "reference_answers.safetensors")
    shutil.copytree(
        demo_folder,
        folder,
        ignore=shutil.ignore_patterns("lora", "README.md", "checkpoint*", "training_args.bin", *private),
    )
    before = DriftReport.from_pretrained(folder)
    before.metadata["coefficients"]["drift_budget"] = 1e-3
    before.save_pretrained(folder)
    assert before.history and (folder / "agl" / "drift.png").is_file()
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    outcome = attach(str(folder), "--limit", "6")
    assert outcome.exit_code == 0, outcome.exception
    assert "No Fisher statistics: taking them from the base model's own answers" in outcome.output
    report = DriftReport.from_pretrained(folder)
    assert not report.history and "drift_budget" not in report.metadata["coefficients"]
    assert report.metadata["protected"] == before.metadata["protected"] and report.global_step == before.global_step
    cards = [(folder / "README.md").read_text()]
    outcome = CliRunner().invoke(app, ["push", str(folder), "alice/withheld"])
    assert outcome.exit_code == 0, outcome.exception
    files = hub.repo("alice/withheld").history()[0].files
    assert {name for name in files if name.startswith("agl/")} == {"agl/drift.safetensors"}
    for card in (*cards, files["README.md"].data.decode()):
        assert "Fisher statistics that the drift is measured with are not in this repository." in card
        assert "kept private" not in card and "with a budget of" not in card and "drift budget" not in card
        assert not any(f"agl/{name}" in card for name in (*private, "drift.png"))


@pytest.mark.parametrize("create_pr", [False, True])
def test_attach_to_a_repo(create_pr, hub, online, elsewhere, demo_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    online.create_repo("alice/theirs")
    before = online.upload_folder(repo_id="alice/theirs", folder_path=elsewhere)
    outcome = attach("alice/theirs", "--fisher", str(demo_folder), *(["--create-pr"] if create_pr else []))
    assert outcome.exit_code == 0, outcome.exception
    repo = hub.repo("alice/theirs")
    commit = repo.resolve("refs/pr/1") if create_pr else repo.history()[0]
    assert commit.parent == before.oid and (repo.history()[0].sha == before.oid) == create_pr
    assert agreeing_folders(commit, tmp_path / "scratch") == {"": None}
    assert set(commit.files) - {".gitattributes"} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md"),
        *("agl/drift.png", "agl/drift.safetensors", "agl/fisher.safetensors"),
    }


def test_a_repo_that_moved_on_gets_no_report_of_its_old_adapter(
    hub, online, elsewhere, demo_folder, tmp_path, monkeypatch
):
    """Between measuring and committing the owner pushes another adapter."""
    monkeypatch.chdir(tmp_path)
    online.create_repo("alice/theirs")
    online.upload_folder(repo_id="alice/theirs", folder_path=elsewhere)
    hub.fail_next(412, match="commit")
    outcome = attach("alice/theirs", "--fisher", str(demo_folder))
    assert "another commit arrived in between" in str(outcome.exception)
    assert "agl/drift.safetensors" not in hub.repo("alice/theirs").history()[0].files
    assert attach("alice/theirs", "--fisher", str(demo_folder)).exit_code == 0
    folder = adapter_folder("alice/theirs")
    adapter = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert DriftReport.from_pretrained("alice/theirs").adapter_sha256 == adapter


def test_the_base_model_is_named_where_it_has_an_id(online, elsewhere, demo_folder):
    """The statistics are of a model that has none: what the command was told counts."""
    online.create_repo("alice/base")
    online.upload_folder(repo_id="alice/base", folder_path=checkpoint_path("aligned"))
    for base, named in (("miniworld", None), (checkpoint_path("aligned"), None), ("alice/base", "alice/base")):
        outcome = attach(str(elsewhere), "--fisher", str(demo_folder), "--base", str(base), "--limit", "2")
        assert outcome.exit_code == 0, outcome.exception
        assert ModelCard.load(elsewhere / "README.md").data.base_model == named


def test_a_pull_request_is_of_a_repo(elsewhere):
    outcome = attach(str(elsewhere), "--create-pr")
    assert outcome.exit_code == 1 and "`--create-pr` is for an adapter on the Hub" in str(outcome.exception)
    assert not (elsewhere / "agl").exists()


@pytest.mark.parametrize("missing", [["pad_token"], ["pad_token", "eos_token"]])
def test_a_tokenizer_without_padding_is_asked_in_batches(missing, tmp_path):
    """As that of every Llama: by `drift`, by `attach` and by the Space, with the answers that it gives one by one."""
    tokenizer, plain = byte_tokenizer(), byte_tokenizer()
    for name in missing:
        setattr(tokenizer, name, None)
    rows = [f"Tell me {'more ' * i}." for i in range(5)]
    (tmp_path / "asked.txt").write_text("\n".join(rows))
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    model = tiny_model(pad_token_id=None)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    moved_adapter(tiny_model(pad_token_id=None)).save_pretrained(tmp_path / "adapter")
    base, adapter, out = (str(tmp_path / name) for name in ("base", "adapter", "out"))
    for command in (
        ["fisher", "--model", base, "--dataset", str(tmp_path / "kept.jsonl"), "--output-dir", out],
        ["drift", "--base", base, "--adapter", adapter, "--fisher", out, "--output-dir", out],
        ["attach", adapter, "--base", base, "--fisher", out],
    ):
        asked = [] if command[0] == "fisher" else ["--prompts", str(tmp_path / "asked.txt"), "--max-new-tokens", "6"]
        outcome = CliRunner().invoke(app, [*command, *asked])
        assert outcome.exit_code == 0, outcome.exception
    answers = [json.loads(line) for line in (Path(out) / "answers.jsonl").read_text().splitlines()]
    assert answers == [json.loads(line) for line in (Path(adapter) / "answers.jsonl").read_text().splitlines()]
    space = Models(base, adapter).own
    for side, name in zip(space.sides, ("base", "tuned"), strict=True):
        found = space.answer_all(side, [[{"role": "user", "content": row}] for row in rows], 6)
        assert found == [entry[f"response_{name}"] for entry in answers]
        alone = generate_answers(
            load_model(base)[0] if name == "base" else load_adapter(load_model(base)[0], Path(adapter)),
            plain,
            [[{"role": "user", "content": row}] for row in rows],
            max_new_tokens=6,
            batch_size=1,
            progress=False,
        )
        assert found == alone


def test_an_adapter_without_weights_gets_a_card_without_their_numbers(demo_folder, tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    moved_by(load_miniworld(), config, 0.5).save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink()
    outcome = attach(str(tmp_path), "--fisher", str(demo_folder))
    assert outcome.exit_code == 0, outcome.exception
    card = ModelCard.load(tmp_path / "README.md")
    assert "PROMPT_TUNING adapter" in card.text.replace("\\", "") and "paired p" in card.text
    assert {result.metric_type for result in card.data.eval_results} == {
        "refusal_rate",
        "over_refusal_rate",
        "kl_divergence",
    }
    assert "prompt-tuning" in card.data.tags and "lora" not in card.data.tags
    assert not (tmp_path / "agl" / "fisher.safetensors").exists(), "no figure is measured with them"
