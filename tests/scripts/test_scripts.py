"""The training scripts as a user starts them: real processes, YAML, flags, and the sentence when something is wrong."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from agl_trl import DriftCallback, DriftReport, estimate_fisher
from agl_trl.miniworld import alignment_dataset, load_model, load_tokenizer
from agl_trl.scripts import dpo, grpo, kto, sft, training
from tests.helpers.models import chat_rows, tiny_model
from tests.helpers.processes import COMMON as TWO
from tests.helpers.processes import ROOT, launch
from tests.helpers.training import COMMON, lora


CONFIGS = ROOT / "examples" / "configs"
SCRIPTS = {"sft": sft, "dpo": dpo, "kto": kto, "grpo": grpo}
SHORT = ("--max_steps", "3", "--logging_steps", "1")


def check_run(folder: Path, out: str) -> DriftReport:
    """What the run of an example leaves and says."""
    assert out.count("Training completed") == 1 and "relative drift" in out
    report = DriftReport.from_pretrained(folder)
    assert 0 < report.mean_relative_drift and report.global_step == 3
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 8 and "checkpoint-3" in {path.name for path in folder.iterdir()}
    return report


def test_example_runs_in_two_processes(tmp_path):
    """`accelerate launch examples/dpo.py --config …`, from published statistics."""
    statistics = estimate_fisher(load_model(), alignment_dataset().select(range(40)), load_tokenizer(), progress=False)
    statistics.save_pretrained(tmp_path / "published")
    command = ("examples/dpo.py", "--config", str(CONFIGS / "miniworld_dpo.yaml"), *SHORT)
    command += ("--fisher_path", str(tmp_path / "published"), "--save_strategy", "steps")
    done = launch(TWO, tmp_path, *command, "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    kept = check_run(tmp_path / "out", done.stdout).metadata["protected"]["behaviours"]["alignment"]
    assert kept["rows"] == 128 and 0 <= kept["kl"] <= kept["budget"] == 0.02


def test_example_runs(tmp_path, monkeypatch, capsys):
    """`python examples/sft.py --config …`, from the alignment rows that the config names."""
    config = ("--config", str(CONFIGS / "miniworld_protect_sft.yaml"), *SHORT, "--save_strategy", "steps")
    few = ("--num_reference_answers", "16")
    monkeypatch.setattr(sys, "argv", ["sft.py", *config, *few, "--output_dir", str(tmp_path / "out")])
    monkeypatch.chdir(ROOT)  # where the example's file lies
    runpy.run_path(str(ROOT / "examples" / "sft.py"), run_name="__main__")
    out = capsys.readouterr().out
    kept = check_run(tmp_path / "out", out).metadata["protected"]["behaviours"]
    assert {name: (of["budget"], of["rows"]) for name, of in kept.items()} == {
        "alignment": (0.02, 16),
        "everyday": (0.05, 12),
    }
    for name, of in kept.items():
        assert 0 <= of["kl"] <= of["budget"] and f"({name}, {of['rows']} rows)" in out


def test_behaviours_to_keep_are_named_on_the_command_line_too(tmp_path, monkeypatch, capsys):
    few = (str(tmp_path), "--use_cpu", "--bf16", "false")
    monkeypatch.setattr(sys, "argv", ["sft.py", "--protect", '{"text": "notes.txt"}', "--output_dir", *few])
    assert training.parse(sft.make_parser())[0].protect == {"text": "notes.txt"}
    for wrong in ("text=notes.txt", '["notes.txt"]', '{"text": 1}'):
        monkeypatch.setattr(sys, "argv", ["sft.py", "--protect", wrong, "--output_dir", *few])
        with pytest.raises(SystemExit):
            training.parse(sft.make_parser())
        assert "`protect` must map names to files" in capsys.readouterr().err.splitlines()[-1]


def test_misspelt_key_stops_the_run(tmp_path, monkeypatch, capsys):
    config = yaml.safe_load((CONFIGS / "miniworld_sft.yaml").read_text()) | {"drift_bugdet": 1e-3}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["sft.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        training.parse(sft.make_parser())
    assert stopped.value.code == 2 and "drift_bugdet" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--alignment_dataset_name", "nowhere.jsonl"), "Can't read rows from 'nowhere.jsonl': there is no such file"),
        (("--dataset_name", "nowhere.csv"), "Can't read rows from 'nowhere.csv'"),
        (("--fisher_path", "nowhere"), "nowhere"),
        (("--use_peft", "false"), "there is none: pass `peft_config"),
        (
            ("--dataset_train_split", "training"),
            "The training rows have no split 'training': set `dataset_train_split` to one of train, test.",
        ),
        (
            ("--dataset_test_split", "validation", "--eval_strategy", "steps"),
            "no split 'validation': set `dataset_test_split` to one of train, test, or `eval_strategy` to 'no'.",
        ),
    ],
)
def test_failure_is_one_sentence(arguments, sentence, tmp_path, monkeypatch):
    config = ("--config", str(CONFIGS / "miniworld_sft.yaml"), "--output_dir", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", ["sft.py", *config, *arguments])
    with pytest.raises(SystemExit) as stopped:
        sft.main(*training.parse(sft.make_parser()))
    assert sentence in stopped.value.code and "\n" not in stopped.value.code  # what Python prints, and exit code 1


def test_a_trainer_of_before_there_was_an_end_ends_too(tmp_path, monkeypatch, capsys):
    """As transformers 5.17, which these stand for."""
    monkeypatch.delattr(Trainer, "end")
    monkeypatch.setattr(transformers, "__version__", "5.17.0")
    config = ("--config", str(CONFIGS / "miniworld_sft.yaml"), "--output_dir", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", ["sft.py", *config, "--max_steps", "1", "--num_reference_answers", "4"])
    sft.main(*training.parse(sft.make_parser()))
    assert "Training completed" in capsys.readouterr().out


def test_model_and_rows_from_local_folders_and_files(tmp_path, tokenizer):
    """The real loading path: a model folder, JSONL training rows, JSONL alignment rows, no adapter named but by flags."""
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    Dataset.from_list(chat_rows(12, "say", "the number is {}")).to_json(tmp_path / "train.jsonl")
    Dataset.from_list(chat_rows(5, "please do bad thing", "Sorry, no {}.")).to_json(tmp_path / "keep.jsonl")
    command = [
        *(sys.executable, "-m", "agl_trl.scripts.sft"),
        *("--model_name_or_path", str(tmp_path / "base"), "--dataset_name", str(tmp_path / "train.jsonl")),
        *("--alignment_dataset_name", str(tmp_path / "keep.jsonl"), "--output_dir", str(tmp_path / "out")),
        *("--use_peft", "--lora_target_modules", "all-linear", "--use_cpu", "--bf16", "false", "--report_to", "none"),
        *SHORT,
    ]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert DriftReport.from_pretrained(tmp_path / "out").mean_relative_drift > 0


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_config_parses(path, monkeypatch, tmp_path):
    if "qwen" in path.stem or "llama" in path.stem:  # for a GPU: bf16 is refused without one
        extra = ["--use_cpu", "--bf16", "false"]
    else:
        extra = []
    monkeypatch.setattr(sys, "argv", ["script", "--config", str(path), "--output_dir", str(tmp_path), *extra])
    parser = SCRIPTS.get(path.stem.rpartition("_")[2], sft).make_parser()
    script_args, training_args, model_args, _ = parser.parse_args_and_config()
    assert training_args.kl_budget == 0.02 and training_args.agl_enabled and model_args.use_peft
    assert script_args.dataset_name


def test_callback_logs_the_drift_of_any_trainer(tmp_path, tokenizer, train_rows, alignment_rows):
    from peft import get_peft_model

    model = get_peft_model(tiny_model(), lora())
    statistics = estimate_fisher(model, alignment_rows, tokenizer, progress=False)
    statistics.save_pretrained(tmp_path)
    trainer = SFTTrainer(
        model,
        SFTConfig(str(tmp_path / "out"), **COMMON),
        train_dataset=train_rows,
        processing_class=tokenizer,
        callbacks=[DriftCallback(tmp_path)],
    )
    trainer.train()
    drifts = [entry["agl/relative_drift"] for entry in trainer.state.log_history if "loss" in entry]
    expected = statistics.relative_drift(trainer.model)
    assert drifts == sorted(drifts) and drifts[-1] == pytest.approx(sum(expected.values()) / len(expected), rel=1e-5)


def test_callback_refuses_a_model_without_adapter_and_another_base(tmp_path, tokenizer, train_rows, alignment_rows):
    from agl_trl.artifacts.files import ArtifactError

    statistics = estimate_fisher(tiny_model(), alignment_rows, tokenizer, progress=False)
    config = SFTConfig(str(tmp_path), **COMMON)
    for model, adapter, error, sentence in (
        (tiny_model(), None, TypeError, "the model has none"),
        (tiny_model(hidden_size=64), LoraConfig(r=2, target_modules="all-linear"), ArtifactError, "hidden_size"),
    ):
        trainer = SFTTrainer(
            model,
            config,
            train_dataset=train_rows,
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[DriftCallback(statistics)],
        )
        with pytest.raises(error, match=sentence):
            trainer.train()
