"""AGLGRPOTrainer: nothing when it is off, and the evidence of its run when it is on."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from trl import GRPOConfig, GRPOTrainer

from agl_trl import AGLGRPOConfig, AGLGRPOTrainer, DriftReport
from tests.helpers.models import chat_rows, tiny_model
from tests.helpers.training import COMMON, adapter_of, logged, lora


GRPO = COMMON | dict(num_generations=2, max_completion_length=6)


def short(completions, **kwargs) -> list[float]:
    """Rewards short answers, and those with an `e` a little."""
    return [-len(c[0]["content"]) + 0.1 * c[0]["content"].count("e") for c in completions]


@pytest.fixture(scope="module")
def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": row["prompt"]} for row in chat_rows(24, "say", "")])


def test_switched_off_it_is_grpo_trainer_bit_for_bit(tmp_path, tokenizer, prompts):
    runs = []
    for cls, config in ((GRPOTrainer, GRPOConfig), (AGLGRPOTrainer, AGLGRPOConfig)):
        off = {"alignment_coef": 0.0} if config is AGLGRPOConfig else {}
        trainer = cls(
            tiny_model(),
            reward_funcs=short,
            args=config(str(tmp_path / cls.__name__), **GRPO, **off),
            train_dataset=prompts,
            processing_class=tokenizer,
            peft_config=lora(),
        )
        trainer.train()
        runs.append(trainer)
    plain, ours = runs
    for (name, a), b in zip(adapter_of(plain).items(), adapter_of(ours).values(), strict=True):
        assert torch.equal(a, b), name
    timed = ("step_time", "entropy")
    steps = [[{k: v for k, v in e.items() if k not in timed} for e in logged(run)] for run in runs]
    assert steps[0] == steps[1] and ours.statistics is None


@pytest.mark.parametrize("budget", [dict(drift_budget=1e-4), dict(kl_budget=1e-6)], ids="-".join)
def test_run_is_protected_resumed_and_leaves_its_evidence(tmp_path, tokenizer, prompts, alignment_rows, budget):
    def build():
        return AGLGRPOTrainer(
            tiny_model(),
            reward_funcs=short,
            args=AGLGRPOConfig(str(tmp_path), **budget, **GRPO | dict(save_strategy="steps", save_steps=2)),
            train_dataset=prompts,
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
    assert all("agl/penalty" in entry and "reward" in entry for entry in trainer.state.log_history if "loss" in entry)
    resumed = build()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, a), b in zip(adapter_of(trainer).items(), adapter_of(resumed).values(), strict=True):
        assert torch.equal(a, b), name


def test_an_adapted_model_is_guarded_from_where_it_started_and_its_copy_never_saved(
    tmp_path, tokenizer, prompts, alignment_rows
):
    model = get_peft_model(tiny_model(), lora(lora_dropout=0.0))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainer = AGLGRPOTrainer(
        model,
        reward_funcs=short,
        args=AGLGRPOConfig(str(tmp_path), beta=0.1, **GRPO),
        train_dataset=prompts,
        processing_class=tokenizer,
        alignment_dataset=alignment_rows,
    )
    assert "ref" in trainer.model.peft_config
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "ref").exists() and (tmp_path / "agl" / "reference.safetensors").is_file()
