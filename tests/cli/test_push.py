"""`agl-trl push`: an adapter goes up with its evidence and a card, or the sentence says what is missing."""

import shutil

from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments
from typer.testing import CliRunner

from agl_trl import AlignGuardCallback, AlignGuardConfig
from agl_trl.cli.app import app
from tests.helpers.hub_commits import agreeing_folders
from tests.helpers.models import tiny_model
from tests.helpers.training import COMMON, lora


SECRET = "hf_SECRETsecretSECRET"


def push(*arguments: object):
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def test_adapter_evidence_and_card_are_one_commit(hub, online, demo_folder, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(demo_folder, folder, ignore=shutil.ignore_patterns("lora", "README.md"))
    (folder / "answers.jsonl").write_text("{}")
    outcome = push(folder, "alice/pushed", "--private")
    assert outcome.exit_code == 0, outcome.exception
    commit, first = hub.repo("alice/pushed").history()
    assert outcome.stdout.strip() == f"{hub.url}/alice/pushed/commit/{commit.sha}" and first.title == "initial commit"
    assert agreeing_folders(commit, tmp_path / "scratch") and hub.repo("alice/pushed").private
    assert "# pushed" in commit.files["README.md"].data.decode() and "answers.jsonl" not in commit.files
    assert push(folder, "alice/pushed", "--no-fisher").exit_code == 0
    private = {"agl/fisher.safetensors", "agl/reference_answers.safetensors"}
    assert {*commit.files} - {*hub.repo("alice/pushed").history()[0].files} == private
    assert push(folder, "alice/pushed", "--no-reference-answers").exit_code == 0
    assert {*commit.files} - {*hub.repo("alice/pushed").history()[0].files} == {"agl/reference_answers.safetensors"}
    (folder / "README.md").unlink()
    assert push(folder, "alice/pushed", "--no-reference-answers").exit_code == 0
    card = hub.repo("alice/pushed").history()[0].files["README.md"].data.decode()
    assert "The reference answers are kept private" in card and "`agl/fisher.safetensors`" in card


def test_a_card_that_is_there_tells_what_went_up_and_where(hub, online, demo_folder, tmp_path):
    """Its example loads the repo, in a push with and without statistics; what others wrote in it stays."""
    folder = tmp_path / "adapter"
    shutil.copytree(demo_folder, folder, ignore=shutil.ignore_patterns("lora"))
    with (folder / "README.md").open("a") as card:
        card.write("\nMy own words.\n")

    def pushed(*options: str) -> str:
        assert push(folder, "alice/told", *options).exit_code == 0
        return hub.repo("alice/told").history()[0].files["README.md"].data.decode()

    for options, private in (((), False), (("--no-fisher",), True), ((), False)):
        card = pushed(*options)
        assert "path/to/this/adapter" not in card and card.count('"alice/told"') == 2
        assert ("are kept private" in card) == private != ("`agl/fisher.safetensors`" in card)
        assert card.endswith("My own words.\n") and card.count("## Measured drift") == 1


def test_a_card_of_ones_own_gets_the_id_alone(hub, online, demo_folder, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(demo_folder, folder, ignore=shutil.ignore_patterns("lora"))
    (folder / "README.md").write_text("# Mine\n\nFrom `path/to/this/adapter`.\n")
    assert push(folder, "alice/own").exit_code == 0
    assert hub.repo("alice/own").history()[0].files["README.md"].data == b"# Mine\n\nFrom `alice/own`.\n"
    assert (folder / "README.md").read_text() == "# Mine\n\nFrom `path/to/this/adapter`.\n"


def test_what_the_callback_guarded_gets_a_card_and_leaves_its_token_here(
    hub, online, tokenizer, alignment_rows, tmp_path
):
    """A plain `Trainer` pickles its arguments as they are, and PEFT saves an empty card, which names the folder of the base model."""
    tiny_model().save_pretrained(tmp_path / "base")
    run = tmp_path / "run"
    trainer = Trainer(
        get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora()),
        TrainingArguments(
            str(run), **COMMON | dict(max_steps=2, save_strategy="steps", save_steps=1), hub_token=SECRET
        ),
        train_dataset=Dataset.from_dict(tokenizer([f"say {i}" for i in range(8)])),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[
            AlignGuardCallback(
                AlignGuardConfig(drift_budget=1e-3), alignment_dataset=alignment_rows, processing_class=tokenizer
            )
        ],
    )
    trainer.train()
    trainer.save_model()
    stub = (run / "README.md").read_text()
    assert "[More Information Needed]" in stub and str(tmp_path / "base") in stub
    pickled = [path for path in run.rglob("training_args.bin") if SECRET.encode() in path.read_bytes()]
    assert len(pickled) == 3, "of the run and of its two checkpoints"
    outcome = push(run, "alice/guarded", "--checkpoints")
    assert outcome.exit_code == 0, outcome.exception
    files = hub.repo("alice/guarded").history()[0].files
    card = files["README.md"].data.decode()
    assert card.count("## Measured drift") == 1 and "# guarded\n" in card and "[More Information Needed]" not in card
    assert str(tmp_path) not in card and "`agl/fisher.safetensors`" in card and "agl/drift.png" in card
    assert "checkpoint-1/adapter_model.safetensors" in files
    assert not any(name.endswith("training_args.bin") or SECRET.encode() in blob.data for name, blob in files.items())


def test_checkpoints_go_up_where_asked_for_and_onto_the_branch(hub, online, demo_folder, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(demo_folder, folder, ignore=shutil.ignore_patterns("lora"))
    shutil.copytree(folder, tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1").rename(folder / "checkpoint-1")
    assert push(folder, "alice/pushed").exit_code == 0
    assert not any(name.startswith("checkpoint-1/") for name in hub.repo("alice/pushed").history()[0].files)
    online.create_branch("alice/pushed", branch="all")
    outcome = push(folder, "alice/pushed", "--checkpoints", "--revision", "all")
    assert outcome.exit_code == 0, outcome.exception
    assert {*agreeing_folders(hub.repo("alice/pushed").resolve("all"), tmp_path / "scratch")} == {"", "checkpoint-1/"}
    assert len(hub.repo("alice/pushed").history()) == 2, "nothing on the main branch"


def test_answers_of_an_interrupted_measurement_stay_here(hub, online, demo_folder, tmp_path):
    """They may say what nobody should read; and an adapter in a checkpoint is not the one that the report is of."""
    folder = tmp_path / "adapter"
    shutil.copytree(demo_folder, folder, ignore=shutil.ignore_patterns("lora"))
    (folder / "unfinished-0123456789ab.jsonl").write_text("{}")
    assert push(folder, "alice/interrupted").exit_code == 0
    assert not any("unfinished" in name for name in hub.repo("alice/interrupted").history()[0].files)
    (folder / "checkpoint-1").mkdir()
    (folder / "adapter_model.safetensors").rename(folder / "checkpoint-1" / "adapter_model.safetensors")
    for options in ((), ("--checkpoints",)):
        outcome = push(folder, "alice/none", *options)
        assert outcome.exit_code != 0 and "There is no adapter in" in str(outcome.exception), outcome.output


def test_what_is_missing_is_said(hub, online, demo_folder, tmp_path):
    empty, bare = tmp_path / "empty", tmp_path / "bare"
    empty.mkdir(), bare.mkdir()
    shutil.copy(demo_folder / "adapter_model.safetensors", bare)
    for folder, sentence in (
        (tmp_path / "no", "There is no folder"),
        (empty, "There is no adapter in"),
        (bare, "There is no report in"),
    ):
        outcome = push(folder, "alice/x")
        assert sentence in str(outcome.exception) and str(folder) in str(outcome.exception)
        assert outcome.exit_code == 1 and not hub.repos
