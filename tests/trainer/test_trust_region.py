"""The trust region of a run: held after every step, resumed to the last bit, and what it is for."""

import shutil

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

from agl_trl import DriftReport
from tests.helpers.training import adapter_of, agl_trainer, lora, telling_model


FAST = dict(learning_rate=3e-2, max_steps=10, anchor_every=5, kl_budget=0.02)


class Watch(TrainerCallback):
    """Drift after every step, the limit it was held to, and the KL of all rows."""

    def __init__(self, guard):
        self.guard, self.drifts, self.limits, self.kl = guard, [], [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        regularizer = self.guard.regularizer
        with torch.no_grad():
            self.drifts.append(regularizer.drift(regularizer.factors()).mean().item())
            self.kl.append(self.guard.references.kl(model)[:, 0].mean().item())
        region = regularizer.trust_region
        self.limits.append(float("inf") if region is None else region.limit().item())


def watched(folder, tokenizer, opposite_rows, mixed_rows, model=None, **options):
    trainer = agl_trainer(
        folder, tokenizer, opposite_rows, mixed_rows, telling_model() if model is None else model, **FAST | options
    )
    watch = Watch(trainer.align_guard)
    trainer.add_callback(watch)
    trainer.train()
    return trainer, watch


def test_the_drift_is_within_its_limit_after_every_step_and_the_kl_far_below_a_free_run(
    tmp_path, tokenizer, opposite_rows, mixed_rows
):
    free, unheld = watched(tmp_path / "free", tokenizer, opposite_rows, mixed_rows, trust_radius=None)
    trainer, watch = watched(tmp_path, tokenizer, opposite_rows, mixed_rows)
    assert all(drift <= limit * (1 + 1e-4) for drift, limit in zip(watch.drifts, watch.limits, strict=True))
    assert max(watch.drifts) == pytest.approx(max(watch.limits), rel=1e-2), "and it is what held the run"
    assert watch.drifts[-1] < 0.5 * unheld.drifts[-1] and watch.kl[-1] < 0.5 * unheld.kl[-1]
    assert free.align_guard.protection.scale < trainer.align_guard.protection.scale, "less is taken back at the end"
    logged = [entry for entry in trainer.state.log_history if "agl/drift_limit" in entry]
    assert len(logged) == 10 and logged[-1]["agl/drift_limit"] == pytest.approx(watch.limits[-1])
    assert all(entry["agl/penalty"] == 0 for entry in logged if "agl/kl" not in entry), "no gradient of the form"
    settings = trainer.drift_report().metadata["coefficients"]
    assert settings["trust_radius"] == 2.0 and "fisher_coef" not in settings


def test_it_narrows_while_rows_are_beyond_and_widens_while_they_are_within(
    tmp_path, tokenizer, opposite_rows, mixed_rows
):
    """Against a budget that a first step exceeds the limit falls; against one that nothing reaches it grows."""
    limits = {}
    for budget in (1e-4, 10.0):
        options = dict(kl_budget=budget, anchor_every=1, anchor_coef=0.0)
        trainer, watch = watched(tmp_path / str(budget), tokenizer, opposite_rows, mixed_rows, **options)
        shares = [
            entry["agl/kl_budget_share"] for entry in trainer.state.log_history if "agl/kl_budget_share" in entry
        ]
        limits[budget] = watch.limits
        assert len(shares) == 10 and shares[-1] == pytest.approx(trainer.state.log_history[-2]["agl/kl"] / budget)
    assert limits[1e-4][-1] < limits[1e-4][0] and limits[10.0][-1] > limits[10.0][0]


def test_a_resumed_run_holds_the_limit_that_the_run_had(tmp_path, tokenizer, opposite_rows, mixed_rows):
    options = dict(save_strategy="steps", save_steps=5, save_total_limit=None, anchor_every=2)
    whole, watch = watched(tmp_path / "whole", tokenizer, opposite_rows, mixed_rows, **options)
    shutil.copytree(tmp_path / "whole/checkpoint-5", tmp_path / "part/checkpoint-5")
    part = agl_trainer(tmp_path / "part", tokenizer, opposite_rows, mixed_rows, telling_model(), **FAST | options)
    rest = Watch(part.align_guard)
    part.add_callback(rest)
    part.train(resume_from_checkpoint=str(tmp_path / "part/checkpoint-5"))
    assert rest.limits == watch.limits[5:] and rest.drifts == watch.drifts[5:]
    assert rest.limits[0] != watch.limits[0], "not the one it began with"
    for name, value in adapter_of(whole).items():
        assert torch.equal(value, adapter_of(part)[name]), name
    without = FAST | options | dict(kl_budget=None, anchor_coef=0.6)
    other = agl_trainer(tmp_path / "part", tokenizer, opposite_rows, mixed_rows, telling_model(), **without)
    other.train(resume_from_checkpoint=str(tmp_path / "part/checkpoint-5"))
    assert other.align_guard.regularizer.trust_region is None, "not of a budget that is gone"
    part.save_model()
    saved = DriftReport.from_pretrained(tmp_path / "part").metadata["protected"]["share_per_drift"]
    assert saved == part.align_guard.regularizer.trust_region.share_per_drift.item()


def test_a_continued_adapter_is_held_near_where_it_started(tmp_path, tokenizer, opposite_rows, mixed_rows):
    """The drift is of the movement, and what A alone has moved stays."""

    def moved():
        model = get_peft_model(telling_model(), lora())
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        return model

    _, unheld = watched(tmp_path / "free", tokenizer, opposite_rows, mixed_rows, moved(), trust_radius=None)
    trainer, watch = watched(tmp_path, tokenizer, opposite_rows, mixed_rows, moved())
    assert trainer.drift_report().metadata["continued"]
    assert watch.drifts[-1] < 0.5 * unheld.drifts[-1] and watch.kl[-1] < unheld.kl[-1]
