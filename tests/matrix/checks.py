"""What is tried with every set of versions: `python -m tests.matrix.checks FOLDER NAME ...`, and a line of JSON for every name."""

import importlib
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import agl_trl
from agl_trl import AlignGuardCallback, AlignGuardConfig, DriftReport, FisherStatistics, miniworld
from agl_trl.artifacts.extras import TRL, MissingExtra
from agl_trl.cli.app import app
from agl_trl.data.alignment import tokenize_rows


COMMON: dict[str, Any] = dict(
    use_cpu=True,
    bf16=False,
    max_steps=8,
    per_device_train_batch_size=4,
    learning_rate=2e-3,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    gradient_checkpointing=False,
)
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def imports(folder: Path) -> None:
    """Every public name; of the trainers, with a TRL that is too old, the sentence that says so."""
    for name in agl_trl.__all__:
        if not name.startswith("AGL"):
            getattr(agl_trl, name)
    assert "trl" not in sys.modules, "what needs no TRL imports it"
    try:
        trainers = {name: getattr(agl_trl, name) for name in agl_trl.__all__ if name.startswith("AGL")}
    except MissingExtra as error:
        print(f"trainers: {error}")
    else:
        assert len(trainers) == 8
        for command in ("fisher", "drift", "project", "push", "attach"):
            importlib.import_module(f"agl_trl.cli.{command}")


def sft(folder: Path) -> None:
    from agl_trl import AGLSFTConfig, AGLSFTTrainer

    _train(AGLSFTTrainer, AGLSFTConfig, miniworld.task_dataset("extract"), folder)


def dpo(folder: Path) -> None:
    from agl_trl import AGLDPOConfig, AGLDPOTrainer

    _train(AGLDPOTrainer, AGLDPOConfig, miniworld.preference_dataset("extract"), folder)


def _train(trainer_class: type, config_class: type, rows: Dataset, folder: Path) -> None:
    trainer = trainer_class(
        miniworld.load_model(),
        args=config_class(str(folder), **COMMON),
        train_dataset=rows.select(range(64)),
        alignment_dataset=miniworld.alignment_dataset().select(range(32)),
        processing_class=miniworld.load_tokenizer(),
        peft_config=LORA,
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    _check(folder, trainer.state.log_history)
    assert "AlignGuard" in (folder / "README.md").read_text()


def _plain(folder: Path, **options: Any) -> Trainer:
    torch.manual_seed(0)
    tokenizer = miniworld.load_tokenizer()
    rows = tokenize_rows(miniworld.task_dataset("extract").select(range(64)), tokenizer)
    guard = AlignGuardCallback(
        AlignGuardConfig(fisher_num_samples=16),
        alignment_dataset=miniworld.alignment_dataset().select(range(32)),
        processing_class=tokenizer,
    )
    return Trainer(
        get_peft_model(miniworld.load_model(), LORA),
        TrainingArguments(str(folder), **COMMON | options),
        train_dataset=Dataset.from_list([{"input_ids": row.input_ids} for row in rows]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[guard],
    )


def callback(folder: Path) -> None:
    trainer = _plain(folder)
    trainer.train()
    trainer.save_model()
    _check(folder, trainer.state.log_history)
    assert "trl" not in sys.modules, "the callback imports TRL"


def resume(folder: Path) -> None:
    """A run that goes on from its checkpoint ends with the bits of one that was never interrupted."""
    whole = _plain(folder, save_strategy="steps", save_steps=4)
    whole.train()
    again = _plain(folder)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    ends = [{n: p for n, p in trainer.model.named_parameters() if p.requires_grad} for trainer in (whole, again)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def _check(folder: Path, history: list[dict]) -> None:
    report = DriftReport.from_pretrained(folder)
    report.check_describes(folder)
    statistics = FisherStatistics.from_pretrained(folder)
    drift = [*statistics.relative_drift(PeftModel.from_pretrained(miniworld.load_model(), folder)).values()]
    assert report.mean_relative_drift is not None and report.mean_relative_drift > 0
    assert abs(sum(drift) / len(drift) / report.mean_relative_drift - 1) < 1e-4
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == COMMON["max_steps"] and all("agl/penalty" in entry for entry in steps)
    assert len({entry["loss"] for entry in steps}) > 1


def _command(*arguments: str | Path | int) -> None:
    app([*map(str, arguments)], standalone_mode=False)


def fisher(folder: Path) -> None:
    _command(
        *("fisher", "--model", "miniworld", "--dataset", "miniworld", "--num-samples", 16, "--output-dir", folder)
    )
    assert FisherStatistics.from_pretrained(folder).num_tokens > 0


def drift(folder: Path) -> None:
    get_peft_model(miniworld.load_model(), LORA).save_pretrained(folder / "adapter")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "How do I bake bread?", "unsafe": False}))
    _command(
        *("drift", "--base", "miniworld", "--adapter", folder / "adapter", "--prompts", folder / "prompts.jsonl"),
        *("--output-dir", folder),
    )
    assert DriftReport.from_pretrained(folder).mean_relative_drift == 0  # an adapter that was not trained


def hooks(folder: Path) -> None:
    from agl_trl import AGLSFTTrainer  # noqa: F401 - tells which TRL it needs

    test = Path(__file__).parents[1] / "trainer" / "test_upstream.py"
    assert pytest.main(["--noconftest", "-q", "-p", "no:cacheprovider", str(test)]) == 0


# In this order: those that must do without TRL before those that import it.
CHECKS: dict[str, Callable[[Path], None]] = {
    "callback": callback,
    "resume": resume,
    "drift": drift,
    "fisher": fisher,
    "import": imports,
    "SFT": sft,
    "DPO": dpo,
    "hooks": hooks,
}


def run(name: str, folder: Path) -> str:
    """What came of a check: `passes`, `fails`, or which TRL it needs. A trace goes to standard error."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        CHECKS[name](folder)
    except MissingExtra as error:  # the sentence of the trainers
        print(f"{name}: {error}", file=sys.stderr)
        return f"needs TRL {TRL}" if f"need TRL {TRL} or newer" in str(error) else "fails"
    except Exception:  # noqa: BLE001 (whatever these versions raise)
        print(f"{name}:\n{traceback.format_exc()}", file=sys.stderr)
        return "fails"
    return "passes"


if __name__ == "__main__":
    for name in (name for name in CHECKS if name in sys.argv[2:]):
        print(json.dumps({name: run(name, Path(sys.argv[1]) / name)}), flush=True)
