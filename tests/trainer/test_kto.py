"""AGLKTOTrainer: nothing when it is off, and the evidence of its run when it is on."""

import pytest
import torch
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from agl_trl import AGLKTOConfig, AGLKTOTrainer, DriftReport
from tests.helpers.models import chat_rows, tiny_model
from tests.helpers.training import COMMON, adapter_of, logged, lora


@pytest.fixture(scope="module")
def judged() -> Dataset:
    """Answers of which every second one is good."""
    rows = chat_rows(24, "say", "the number is {}")
    return Dataset.from_list([row | {"label": i % 2 == 0} for i, row in enumerate(rows)])


def test_switched_off_it_is_kto_trainer_bit_for_bit(tmp_path, tokenizer, judged):
    runs = []
    for cls, config in ((KTOTrainer, KTOConfig), (AGLKTOTrainer, AGLKTOConfig)):
        off = {"alignment_coef": 0.0} if config is AGLKTOConfig else {}
        trainer = cls(
            tiny_model(),
            args=config(str(tmp_path / cls.__name__), **COMMON, **off),
            train_dataset=judged,
            processing_class=tokenizer,
            peft_config=lora(),
        )
        trainer.train()
        runs.append(trainer)
    plain, ours = runs
    for (name, a), b in zip(adapter_of(plain).items(), adapter_of(ours).values(), strict=True):
        assert torch.equal(a, b), name
    assert logged(plain) == logged(ours) and ours.statistics is None


@pytest.mark.parametrize("budget", [dict(drift_budget=1e-4), dict(kl_budget=1e-6)], ids="-".join)
def test_run_is_protected_resumed_and_leaves_its_evidence(tmp_path, tokenizer, judged, alignment_rows, budget):
    def build():
        return AGLKTOTrainer(
            tiny_model(),
            args=AGLKTOConfig(str(tmp_path), **budget, **COMMON | dict(save_strategy="steps", save_steps=2)),
            train_dataset=judged,
            processing_class=tokenizer,
            peft_config=lora(),
            alignment_dataset=alignment_rows,
        )

    trainer = build()
    trainer.train()
    trainer.save_model()
    report = DriftReport.from_pretrained(tmp_path)
    report.check_describes(tmp_path)
    if "drift_budget" in budget:
        assert 0 < report.mean_relative_drift <= 1e-4 and report.budget_multiplier > 0
    else:
        held = report.metadata["protected"]
        assert held["scale"] < 1 and 0 < held["behaviours"]["alignment"]["kl"] <= 1e-6
    assert all("agl/penalty" in entry for entry in trainer.state.log_history if "loss" in entry)
    resumed = build()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, a), b in zip(adapter_of(trainer).items(), adapter_of(resumed).values(), strict=True):
        assert torch.equal(a, b), name
