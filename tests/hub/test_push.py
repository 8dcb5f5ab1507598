"""Pushes over a local Hub: whatever the strategy, every commit holds an adapter and the evidence of that very adapter."""

import logging
import threading
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from transformers import TrainerCallback

from agl_trl import AGLDPOConfig, AGLDPOTrainer, AGLSFTConfig, AGLSFTTrainer, DriftReport, FisherStatistics
from agl_trl.artifacts.upload import PushError
from agl_trl.fisher.calibration import drift_at
from agl_trl.hub.push import check_agreement, files_to_push, push_folder
from tests.helpers.hub_commits import agreeing_folders
from tests.helpers.models import chat_rows, tiny_model
from tests.helpers.training import COMMON, lora


REPO = "alice/adapter"
STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")


def pushing_trainer(path, tokenizer, train_rows, alignment_rows, **config) -> AGLSFTTrainer:
    options = dict(push_to_hub=True, hub_model_id=REPO, save_strategy="steps", save_steps=1, max_steps=3)
    return AGLSFTTrainer(
        tiny_model(),
        AGLSFTConfig(str(path), **COMMON | options | config),
        train_dataset=train_rows,
        processing_class=tokenizer,
        peft_config=lora(),
        alignment_dataset=alignment_rows,
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_commit_of_every_strategy_agrees(strategy, hub, online, tmp_path, tokenizer, train_rows, alignment_rows):
    """Also when saves come faster than pushes: every upload is slow, and every save asks for one."""
    for _ in range(3):
        hub.fail_next("slow", match="lfs-put", seconds=0.5)
    output = tmp_path / "run"
    trainer = pushing_trainer(
        output, tokenizer, train_rows, alignment_rows, hub_strategy=strategy, hub_always_push=True
    )
    trainer.train()
    trainer.push_to_hub()
    history = hub.repo(REPO).history()[::-1]
    steps = [agreeing_folders(commit, tmp_path / "scratch") for commit in history[1:]]
    titles = [commit.title for commit in history[1:]]
    if strategy == "end":
        assert steps == [{"": 3}]
    else:
        assert titles[:3] == [f"Training in progress, step {step}" for step in (1, 2, 3)]
        assert [step[""] for step in steps[:3]] == [1, 2, 3]
        assert "README.md" in history[1].files and "tokenizer.json" in history[1].files
    if strategy == "checkpoint":
        assert [step["last-checkpoint/"] for step in steps[:3]] == [1, 2, 3]
        assert "last-checkpoint/optimizer.pt" in history[1].files
    if strategy == "all_checkpoints":
        assert steps[2] == {"": 3, "checkpoint-1/": 1, "checkpoint-2/": 2, "checkpoint-3/": 3}
    fisher = {commit.files["agl/fisher.safetensors"].sha256 for commit in history[1:]}
    assert len(fisher) == 1
    assert not any("/_" in name or name.startswith("_") for commit in history for name in commit.files)
    assert not list(output.glob("_push-*"))


def test_private_statistics_stay_here(hub, online, tmp_path, tokenizer, train_rows, alignment_rows):
    trainer = pushing_trainer(
        tmp_path, tokenizer, train_rows, alignment_rows, push_fisher=False, hub_strategy="all_checkpoints"
    )
    trainer.train()
    trainer.push_to_hub()
    for commit in hub.repo(REPO).history():
        assert not any("fisher" in name or "reference_answers" in name for name in commit.files)
    for name in ("fisher", "reference_answers"):
        assert (tmp_path / "agl" / f"{name}.safetensors").is_file()
    DriftReport.from_pretrained(REPO)


def test_private_reference_answers_stay_here(
    hub, online, naps, tmp_path, tokenizer, train_rows, alignment_rows, caplog
):
    """In no commit of a checkpoint, and not by the command that repeats a push that failed."""
    hub.fail_next(500, match="commit")
    options = dict(push_reference_answers=False, hub_strategy="all_checkpoints", hub_always_push=True, max_steps=2)
    trainer = pushing_trainer(tmp_path, tokenizer, train_rows, alignment_rows, **options)
    with caplog.at_level(logging.ERROR):
        trainer.train()
    (message,) = [record.getMessage() for record in caplog.records if "agl-trl push" in record.getMessage()]
    assert message.endswith(f"{REPO} --no-reference-answers --checkpoints`")
    trainer.push_to_hub()
    history = hub.repo(REPO).history()[:-1]
    assert history and all("agl/fisher.safetensors" in commit.files for commit in history)
    assert not any("reference_answers" in name for commit in history for name in commit.files)
    assert (tmp_path / "agl" / "reference_answers.safetensors").is_file()
    assert "The reference answers are kept private" in history[0].files["README.md"].data.decode()


def test_statistics_of_an_earlier_push_leave_with_it(hub, online, tmp_path, tokenizer, train_rows, alignment_rows):
    trainer = pushing_trainer(tmp_path, tokenizer, train_rows, alignment_rows, save_strategy="no")
    trainer.train()
    trainer.push_to_hub()
    evidence = {"agl/fisher.safetensors", "agl/reference_answers.safetensors"}
    assert evidence <= {*hub.repo(REPO).history()[0].files}
    trainer.args.push_reference_answers = False
    trainer.push_to_hub()
    assert evidence & {*hub.repo(REPO).history()[0].files} == {"agl/fisher.safetensors"}
    trainer.args.push_fisher, trainer.args.push_reference_answers = False, True
    trainer.push_to_hub()
    assert not evidence & {*hub.repo(REPO).history()[0].files}, "never reference answers alone"


def test_rerun_is_no_commit(hub, online, tmp_path, tokenizer, train_rows, alignment_rows):
    trainer = pushing_trainer(tmp_path, tokenizer, train_rows, alignment_rows, save_strategy="no")
    trainer.train()
    trainer.push_to_hub()
    count = len(hub.repo(REPO).history())
    trainer.push_to_hub()
    assert len(hub.repo(REPO).history()) == count


def test_reference_adapter_is_never_pushed(hub, online, tmp_path, tokenizer, alignment_rows):
    from peft import get_peft_model

    rows = [
        {**row, "chosen": row["completion"], "rejected": row["prompt"][-1:]} for row in chat_rows(8, "say", "no {}")
    ]
    rows = [
        {"prompt": r["prompt"], "chosen": r["chosen"], "rejected": [{"role": "assistant", "content": "x"}]}
        for r in rows
    ]
    from datasets import Dataset

    options = dict(push_to_hub=True, hub_model_id=REPO, hub_strategy="all_checkpoints", save_steps=1, max_steps=2)
    trainer = AGLDPOTrainer(
        get_peft_model(tiny_model(), lora()),
        args=AGLDPOConfig(str(tmp_path), **COMMON | dict(save_strategy="steps") | options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        alignment_dataset=alignment_rows,
    )
    trainer.train()
    trainer.push_to_hub()
    for commit in hub.repo(REPO).history()[:-1]:
        assert agreeing_folders(commit, tmp_path / "scratch")
        assert not any("ref/" in name for name in commit.files)


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def test_answers_and_temporary_files_stay_here_at_any_depth(tmp_path):
    kept = ["adapter_config.json", "checkpoint-1/adapter_config.json", "report/my_notes.txt", "report/questions.jsonl"]
    answers = ("answers.jsonl", "abilities.jsonl", "adapter-answers.jsonl", "unfinished-0123456789ab.jsonl")
    private = (*answers, "_half.txt", "_push-1/notes.txt", ".cache/notes.txt", ".git/HEAD")
    stay = [f"{place}{name}" for place in ("", "report/", "checkpoint-1/report/") for name in private]
    assert files_to_push(touched(tmp_path, *kept, *stay), checkpoints=True) == kept


def test_the_frozen_adapter_of_dpo_is_told_by_what_it_holds(tmp_path):
    adapter = ("adapter_config.json", "adapter_model.safetensors")
    frozen = [f"{place}ref/{name}" for place in ("", "checkpoint-1/") for name in (*adapter, "README.md")]
    trained = sorted(f"{place}{name}" for place in ("", "checkpoint-1/") for name in adapter)
    assert files_to_push(touched(tmp_path, *trained, *frozen), checkpoints=True) == trained


def test_a_folder_ref_of_the_user_is_pushed(hub, online, tmp_path):
    names = ["adapter_config.json", "docs/ref/adapter_config.json", "ref/notes.txt", "ref/papers/one.bib"]
    push_folder(touched(tmp_path, *names), REPO, message="push")
    assert sorted({*hub.repo(REPO).history()[0].files} - {".gitattributes"}) == names
    alone = touched(
        tmp_path / "alone", "ref/adapter_config.json"
    )  # beside no other adapter: nothing was trained against it
    assert files_to_push(alone) == ["ref/adapter_config.json"]


def test_failed_background_push_is_told_and_repeated(
    hub, online, naps, tmp_path, tokenizer, train_rows, alignment_rows, caplog
):
    """A mid-training push fails: training goes on, the log names the command, and the command brings the very commit."""
    from typer.testing import CliRunner

    from agl_trl.cli.app import app

    hub.fail_next(500, match="commit")
    output = tmp_path / "run"
    trainer = pushing_trainer(
        output,
        tokenizer,
        train_rows,
        alignment_rows,
        hub_strategy="all_checkpoints",
        hub_always_push=True,
        max_steps=2,
    )
    with caplog.at_level(logging.ERROR):
        trainer.train()
    (message,) = [record.getMessage() for record in caplog.records if "agl-trl push" in record.getMessage()]
    assert "the Hub answered with status 500" in message and "\n" not in message
    command = message.split("`")[1]
    assert command == f"agl-trl push {output / '_push-1'} {REPO} --checkpoints"
    assert "checkpoint-1/adapter_model.safetensors" not in hub.repo(REPO).history()[0].files
    assert CliRunner().invoke(app, command.split()[1:], catch_exceptions=False).exit_code == 0
    commit = hub.repo(REPO).history()[0]
    assert agreeing_folders(commit, tmp_path / "scratch") == {"": 1, "checkpoint-1/": 1, "checkpoint-2/": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer, train_rows, alignment_rows):
    path = tmp_path_factory.mktemp("saved")
    trainer = pushing_trainer(path, tokenizer, train_rows, alignment_rows, push_to_hub=False, save_strategy="no")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    return path


FAULTS = [
    (401, "create", "does not accept the token"),
    (403, "create", "may not write there"),
    (404, "preupload", "no such repo or revision"),
    (409, "commit", "another commit to the repo was in progress"),
    (412, "commit", "another commit arrived in between"),
    (429, "commit", "limits the rate"),
    (500, "commit", "answered with status 500"),
    ("drop", "commit", "could not be reached or dropped the connection"),
    ("drop", "create", "could not be reached or dropped the connection"),
    (403, "commit", "may not write there"),
]


@pytest.mark.parametrize(("status", "endpoint", "sentence"), FAULTS)
def test_every_fault_is_a_sentence_and_the_retry_succeeds(status, endpoint, sentence, hub, online, naps, saved):
    hub.fail_next(status, times=9, match=endpoint)
    if endpoint == "create" and isinstance(status, int):
        hub.fail_next(status, times=9, match="info")  # the client asks whether the repo is there all the same
    with pytest.raises(PushError, match=sentence) as failed:
        push_folder(saved, REPO, message="push")
    assert "\n" not in str(failed.value) and hub.token not in str(failed.value)
    assert failed.value.status == (status if isinstance(status, int) else None)
    if ("models", REPO) in hub.repos:
        assert set(hub.repo(REPO).history()[0].files) == {".gitattributes"}  # whole or not at all
    hub.faults.clear()
    push_folder(saved, REPO, message="push")
    assert set(hub.repo(REPO).history()[0].files) >= set(files_to_push(saved))


def test_slow_answers_are_waited_for_and_a_lost_answer_is_no_second_commit(hub, online, naps, saved):
    hub.fail_next("slow", match="commit", seconds=0.5)
    push_folder(saved, REPO, message="push")
    (saved / "note.txt").write_text("more")
    hub.fail_next("drop", match="commit", after=True)
    with pytest.raises(PushError):
        push_folder(saved, REPO, message="push")
    count = len(hub.repo(REPO).history())
    push_folder(saved, REPO, message="push")
    assert len(hub.repo(REPO).history()) == count
    (saved / "note.txt").unlink()


def test_a_report_of_another_adapter_is_not_pushed(hub, online, saved, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(PushError, match="is of another adapter"):
        check_agreement(folder)
    with pytest.raises(PushError, match="is of another adapter"):
        push_folder(folder, REPO, message="push")
    assert ("models", REPO) not in hub.repos


def test_a_save_during_an_upload_does_not_change_it(hub, online, tmp_path, tokenizer, train_rows, alignment_rows):
    """The upload of step 1 is held until step 3 has been saved over the output folder."""
    release = threading.Event()

    class Hold(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer._hub.run_as_future(release.wait)  # everything after it waits

        def on_train_end(self, args, state, control, **kwargs):
            release.set()

    trainer = pushing_trainer(
        tmp_path, tokenizer, train_rows, alignment_rows, hub_strategy="every_save", hub_always_push=True
    )
    trainer.add_callback(Hold())
    trainer.train()
    steps = [agreeing_folders(commit, tmp_path / "scratch") for commit in hub.repo(REPO).history()[::-1][1:]]
    assert steps == [{"": 1}, {"": 2}, {"": 3}]


def test_the_trainer_says_at_once_where_it_may_not_write(hub, online, tmp_path, tokenizer, train_rows, alignment_rows):
    with pytest.raises(
        PushError, match="Can't create the repo 'bob/theirs' to push to: this account may not write there"
    ):
        pushing_trainer(tmp_path, tokenizer, train_rows, alignment_rows, hub_model_id="bob/theirs")


def test_statistics_alone_protect_a_run(hub, online, tmp_path, tokenizer, train_rows, saved):
    HfApi().create_repo("alice/statistics")
    push_folder(saved, "alice/statistics", message="statistics", files=["agl/fisher.safetensors"])
    trainer = pushing_trainer(
        tmp_path, tokenizer, train_rows, None, fisher_path="alice/statistics", save_strategy="no"
    )
    trainer.train()
    trainer.push_to_hub()
    pushed = hub.repo(REPO).history()[0].files["agl/fisher.safetensors"]
    assert pushed.data == (saved / "agl" / "fisher.safetensors").read_bytes()
    assert FisherStatistics.from_pretrained(REPO).num_tokens == trainer.statistics.num_tokens
    report, card = DriftReport.from_pretrained(REPO), hub.repo(REPO).history()[0].files["README.md"].data.decode()
    translated, _ = drift_at(trainer.statistics, 0.02)
    assert report.metadata["coefficients"]["drift_budget"] == pytest.approx(translated)
    assert report.mean_relative_drift <= translated and "protected" not in report.metadata
    assert "The KL budget of 0.02 was **not measured**" in card and f"relative drift of {translated:.2e}" in card
