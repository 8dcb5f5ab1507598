"""The callback by itself: in a plain `Trainer` and in TRL's reward trainer, with all that it logs, saves and resumes."""

import re

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from trl import RewardConfig, RewardTrainer

from agl_trl import (
    AlignGuardCallback,
    AlignGuardConfig,
    DriftCallback,
    DriftEvalCallback,
    DriftEvalConfig,
    DriftReport,
    FisherStatistics,
    estimate_fisher,
)
from agl_trl.artifacts.files import ArtifactError, sha256
from agl_trl.modeling.lora import adapted_layers
from agl_trl.trainer.evidence import sha256_when_saved
from agl_trl.trainer.gradients import add_gradients, unscale
from tests.helpers.models import SMALL, preference_rows, tiny_model
from tests.helpers.training import COMMON, adapter_of, logged, lora


@pytest.fixture
def rows(train_rows, tokenizer) -> Dataset:
    return train_rows.map(
        lambda row: {"input_ids": tokenizer(row["prompt"][0]["content"])["input_ids"]},
        remove_columns=train_rows.column_names,
    )


def plain_trainer(folder, tokenizer, rows, guard=None, model=None, **options) -> Trainer:
    return Trainer(
        model if model is not None else get_peft_model(tiny_model(), lora()),
        TrainingArguments(str(folder), **COMMON | options),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=None if guard is None else [guard],
    )


def reward_trainer(folder, tokenizer, guard=None, **options) -> RewardTrainer:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=260, pad_token_id=0, eos_token_id=1, bos_token_id=None, num_labels=1, **SMALL)
    return RewardTrainer(
        LlamaForSequenceClassification(config),
        args=RewardConfig(str(folder), **COMMON | options),
        train_dataset=Dataset.from_list(preference_rows(16, "say", "the number is {}", "no idea {}")),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"),
        callbacks=None if guard is None else [guard],
    )


def test_plain_trainer_is_protected_and_leaves_its_evidence(tmp_path, tokenizer, rows, alignment_rows):
    guard = AlignGuardCallback(
        AlignGuardConfig(drift_budget=1e-3), alignment_dataset=alignment_rows, processing_class=tokenizer
    )
    trainer = plain_trainer(tmp_path, tokenizer, rows, guard, save_strategy="steps", save_steps=2)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["agl/relative_drift"] > 0 for entry in steps] == [False, True, True, True]
    trainer.save_model()
    for folder, step in ((tmp_path / "checkpoint-2", 2), (tmp_path / "checkpoint-4", 4), (tmp_path, 4)):
        report, statistics = DriftReport.from_pretrained(folder), FisherStatistics.from_pretrained(folder)
        report.check_describes(folder)  # also of the adapter that was saved after the end
        assert report.global_step == step and (folder / "agl" / "drift.png").is_file()
        model = PeftModel.from_pretrained(tiny_model(), folder)
        drift = statistics.relative_drift(model).values()
        assert sum(drift) / len(drift) == pytest.approx(report.mean_relative_drift, rel=1e-5)
        assert 0 < report.mean_relative_drift <= 1e-3
    assert guard.report is not None and guard.report.budget_multiplier > 0


@pytest.mark.parametrize("kind", ["plain", "reward"])
def test_resumed_run_ends_bit_identical(kind, tmp_path, tokenizer, rows, alignment_rows):
    def build(folder):
        config = AlignGuardConfig(alignment_coef=2.0, drift_budget=1e-4)
        guard = AlignGuardCallback(config, alignment_dataset=alignment_rows, processing_class=tokenizer)
        options = dict(save_strategy="steps", save_steps=2)
        if kind == "reward":
            return reward_trainer(folder, tokenizer, guard, **options)
        return plain_trainer(folder, tokenizer, rows, guard, **options)

    whole = build(tmp_path)
    whole.train()
    resumed = build(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, a), b in zip(adapter_of(whole).items(), adapter_of(resumed).values(), strict=True):
        assert torch.equal(a, b), name
    last = [
        {k: v for k, v in logged(run)[-2].items() if k != "num_tokens"} for run in (whole, resumed)
    ]  # TRL counts anew
    assert last[0] == last[1] and last[0]["agl/penalty"] > 0


def test_a_checkpoint_that_is_elsewhere_is_asked_for(tmp_path, tokenizer, rows, alignment_rows):
    def build(**options):
        guard = AlignGuardCallback(alignment_dataset=alignment_rows, processing_class=tokenizer)
        return plain_trainer(tmp_path, tokenizer, rows, guard, **options)

    build(save_strategy="steps", save_steps=2).train()
    moved = (tmp_path / "checkpoint-2").rename(tmp_path / "elsewhere-2")
    with pytest.raises(ArtifactError, match="goes on at step 2, but there is no checkpoint '.*checkpoint-2'"):
        build().train(resume_from_checkpoint=str(moved))
    build(resume_from_checkpoint=str(moved)).train(resume_from_checkpoint=str(moved))


def test_a_checkpoint_of_another_run_is_not_taken_for_the_one_that_it_goes_on_from(
    tmp_path, tokenizer, rows, alignment_rows
):
    def build(folder, **options):
        guard = AlignGuardCallback(alignment_dataset=alignment_rows, processing_class=tokenizer)
        return plain_trainer(tmp_path / folder, tokenizer, rows, guard, save_strategy="steps", save_steps=2, **options)

    build("old").train()
    build("own", seed=1).train()
    old = str(tmp_path / "old" / "checkpoint-2")
    with pytest.raises(ArtifactError, match="at step 2, but checkpoint '.*own/checkpoint-2' holds another adapter"):
        build("own").train(resume_from_checkpoint=old)
    build("own", resume_from_checkpoint=old).train(resume_from_checkpoint=old)


def in_repo(online, name) -> set[str]:
    return {path for path in online.list_repo_files(name) if path.startswith("agl/") or "/agl/" in path}


ROWS, STATISTICS = "agl/reference_answers.safetensors", "agl/fisher.safetensors"


@pytest.mark.parametrize(("option", "gone"), [("push_reference_answers", {ROWS}), ("push_fisher", {ROWS, STATISTICS})])
def test_a_plain_trainer_does_not_push_what_the_options_keep(
    option, gone, online, tmp_path, tokenizer, rows, alignment_rows
):
    def build(**changes):
        config = AlignGuardConfig(kl_budget=0.02, **{option: False})
        guard = AlignGuardCallback(config, alignment_dataset=alignment_rows, processing_class=tokenizer)
        pushed = dict(
            push_to_hub=True, hub_model_id="alice/run", hub_always_push=True, save_strategy="steps", save_steps=2
        )
        return plain_trainer(tmp_path / "run", tokenizer, rows, guard, **pushed | changes), guard

    trainer, guard = build()
    trainer.train()
    trainer.push_to_hub()
    assert in_repo(online, "alice/run") == {ROWS, STATISTICS, "agl/drift.safetensors", "agl/drift.png"} - gone
    for name in (ROWS, STATISTICS):
        assert (tmp_path / "run" / "checkpoint-2" / name).is_file(), "a run goes on from it"
    ends = adapter_of(trainer), guard.report.metadata
    resumed, again = build()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), adapter_of(resumed).values(), strict=True))
    assert again.report.metadata == ends[1]
    with pytest.raises(
        ValueError, match=r"^`hub_strategy='checkpoint'` pushes whole checkpoints, .* 'every_save' or 'end'\.$"
    ):
        build(hub_strategy="checkpoint")
    # A run that nobody meant to push leaves them, and they are not pushed by a later one.
    alone, _ = build(push_to_hub=False)
    alone.train()
    kept = re.escape(str(tmp_path / "run" / (ROWS if option == "push_reference_answers" else STATISTICS)))
    for push in (build, alone.push_to_hub):
        with pytest.raises(
            ValueError, match=rf"^The trainer would push '{kept}', which the options keep from the Hub"
        ):
            push()


def test_a_model_that_is_made_again_at_every_training_is_the_one_that_is_guarded(
    tmp_path, tokenizer, rows, alignment_rows
):
    """As hyperparameter searches do, by `model_init`."""
    statistics = estimate_fisher(tiny_model(), alignment_rows, tokenizer, progress=False)
    config = AlignGuardConfig(drift_budget=1e-4)
    guard = AlignGuardCallback(config, alignment_dataset=alignment_rows, processing_class=tokenizer)
    watch = DriftEvalCallback(DriftEvalConfig(drift_eval_steps=2, drift_eval_prompts="miniworld", drift_eval_limit=4))
    trainer = Trainer(
        args=TrainingArguments(str(tmp_path), **COMMON | dict(learning_rate=3e-2)),
        model_init=lambda: get_peft_model(tiny_model(), lora()),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=[guard, DriftCallback(statistics), watch],
    )
    for _ in range(2):
        trainer.train()
        drift = guard.statistics.relative_drift(trainer.model).values()
        mean = sum(drift) / len(drift)
        assert 0.5e-4 < mean <= 1e-4 and guard.report.mean_relative_drift == pytest.approx(mean, rel=1e-5)
        assert [entry["agl/relative_drift"] > 0 for entry in logged(trainer) if "loss" in entry][1:] == [True] * 3
        modules = {*trainer.model.modules()}
        assert guard.layers[0].module in modules and watch.layers[0].module in modules


def test_the_measured_drift_counts_from_where_a_continued_adapter_was_when_its_trainer_was_built(
    tmp_path, tokenizer, rows, alignment_rows
):
    """Whether the run is resumed, trained on, or its model made again."""
    statistics = estimate_fisher(tiny_model(), alignment_rows, tokenizer, progress=False)

    def continued():
        model = get_peft_model(tiny_model(), lora())
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    def run(again=False, **model):
        trainer = Trainer(
            args=TrainingArguments(str(tmp_path), **COMMON | dict(save_strategy="steps", save_steps=2)),
            train_dataset=rows,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            callbacks=[callback := DriftCallback(statistics)],
            **model,
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if again else None)
        for layer, start in zip(callback.layers, adapted_layers(continued()), strict=True):
            assert torch.equal(layer.reference.A, start.parameters()[0])
            assert torch.equal(layer.reference.B, start.parameters()[1])
        return trainer, [entry["agl/relative_drift"] for entry in trainer.state.log_history if "loss" in entry]

    trainer, drifts = run(model=continued())
    assert drifts == sorted(drifts) and 0 < drifts[0] < 0.5 * drifts[-1]
    trainer.train()
    on = [entry["agl/relative_drift"] for entry in trainer.state.log_history if "loss" in entry]
    assert min(on) > drifts[1], "not from where the first training ended"
    drifts = run(model=continued())[1]
    assert run(again=True, model=continued())[1] == drifts
    assert run(again=True, model_init=continued)[1][2] > drifts[1]


def test_hash_before_saving_is_that_of_the_file_also_of_tied_embeddings(tmp_path):
    config = lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(tiny_model(tie_word_embeddings=True), config)
    tensors = get_peft_model_state_dict(model).values()
    assert len({tensor.data_ptr() for tensor in tensors}) < len(tensors), "they share their memory"
    model.save_pretrained(tmp_path)
    assert sha256_when_saved(model, "default") == sha256(tmp_path / "adapter_model.safetensors")


def test_reward_trainer_is_protected_and_leaves_its_evidence(tmp_path, tokenizer, alignment_rows):
    """Answers of the model itself can't be had: it predicts no tokens."""
    free = reward_trainer(tmp_path / "free", tokenizer, learning_rate=3e-2, max_steps=6)
    free.train()
    guard = AlignGuardCallback(AlignGuardConfig(drift_budget=1e-4), alignment_dataset=alignment_rows)
    trainer = reward_trainer(
        tmp_path, tokenizer, guard, learning_rate=3e-2, max_steps=6, save_strategy="steps", save_steps=6
    )
    trainer.train()
    unguarded = guard.statistics.relative_drift(free.model).values()
    assert sum(unguarded) / len(unguarded) > 1e-3
    for folder in (tmp_path / "checkpoint-6", tmp_path):
        assert 0 < DriftReport.from_pretrained(folder).mean_relative_drift <= 1e-4
        assert FisherStatistics.from_pretrained(folder).num_tokens == guard.statistics.num_tokens
    requests = [{"prompt": [{"role": "user", "content": "please do bad thing"}]}]
    with pytest.raises(ValueError, match="answered by the model, but this one predicts no tokens"):
        reward_trainer(tmp_path / "no", tokenizer, AlignGuardCallback(alignment_dataset=requests))
    anchored = AlignGuardCallback(AlignGuardConfig(anchor_coef=1.0), alignment_dataset=alignment_rows)
    with pytest.raises(ValueError, match="compares next tokens, but this model predicts none"):
        reward_trainer(tmp_path / "no", tokenizer, anchored)


def test_trainers_that_agl_does_not_know_are_protected(tmp_path, tokenizer, alignment_rows, monkeypatch):
    """ORPO stands for those that others write: all the callback asks is a LoRA adapter and the trainer's events."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    guard = AlignGuardCallback(AlignGuardConfig(drift_budget=1e-4), alignment_dataset=alignment_rows)
    trainer = ORPOTrainer(
        tiny_model(),
        args=ORPOConfig(str(tmp_path), **COMMON | dict(save_strategy="steps", save_steps=2)),
        train_dataset=Dataset.from_list(preference_rows(16, "say", "the number is {}", "no idea {}")),
        processing_class=tokenizer,
        peft_config=lora(),
        callbacks=[guard],
    )
    trainer.train()
    for folder in (tmp_path / "checkpoint-2", tmp_path):
        assert 0 < DriftReport.from_pretrained(folder).mean_relative_drift <= 1e-4
    assert all("agl/penalty" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_published_statistics_need_neither_rows_nor_tokenizer(tmp_path, tokenizer, rows, alignment_rows):
    first = AlignGuardCallback(alignment_dataset=alignment_rows, processing_class=tokenizer)
    plain_trainer(tmp_path / "first", tokenizer, rows, first).train()
    second = AlignGuardCallback(AlignGuardConfig(fisher_path=str(tmp_path / "first")))
    trainer = plain_trainer(tmp_path / "second", tokenizer, rows, second)
    trainer.train()
    files = [tmp_path / name / "agl" / "fisher.safetensors" for name in ("first", "second")]
    assert sha256(files[0]) == sha256(files[1]) and second.report.mean_relative_drift > 0


def test_published_statistics_do_not_guard_the_head(tmp_path, tokenizer, rows, alignment_rows):
    estimate_fisher(tiny_model(), alignment_rows, tokenizer, progress=False).save_pretrained(tmp_path / "published")
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    guard = AlignGuardCallback(AlignGuardConfig(fisher_path=str(tmp_path / "published")))
    with pytest.raises(ArtifactError, match="not the output head 'lm_head'.*without `fisher_path`.*leave it out of"):
        plain_trainer(tmp_path / "run", tokenizer, rows, guard, model).train()


def test_continued_adapter_is_measured_from_where_it_started(tmp_path, tokenizer, rows, alignment_rows):
    model = get_peft_model(tiny_model(), lora())
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    guard = AlignGuardCallback(alignment_dataset=alignment_rows, processing_class=tokenizer)
    trainer = plain_trainer(tmp_path, tokenizer, rows, guard, model=model)
    trainer.train()
    assert trainer.state.log_history[0]["agl/relative_drift"] == pytest.approx(0, abs=1e-9)
    assert (tmp_path / "agl" / "reference.safetensors").is_file() and guard.report.metadata["continued"]


def test_best_checkpoint_is_reported_with_its_own_step(tmp_path, tokenizer, rows, alignment_rows):
    guard = AlignGuardCallback(alignment_dataset=alignment_rows, processing_class=tokenizer)
    options = dict(
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True
    )
    trainer = plain_trainer(tmp_path, tokenizer, rows, guard, learning_rate=0.3, **options)
    trainer.train()
    trainer.save_model()
    report = DriftReport.from_pretrained(tmp_path)
    report.check_describes(tmp_path)
    assert report.global_step == trainer.state.best_global_step


def test_what_cannot_work_is_told_when_the_trainer_is_built(tmp_path, tokenizer, rows, alignment_rows):
    with pytest.raises(ValueError, match="switches AGL off: leave the callback out"):
        AlignGuardCallback(AlignGuardConfig(alignment_coef=0.0))
    guard = AlignGuardCallback(alignment_dataset=alignment_rows, processing_class=tokenizer)
    with pytest.raises(ValueError, match="guards a LoRA adapter, but there is none"):
        plain_trainer(tmp_path, tokenizer, rows, guard, model=tiny_model())
    with pytest.raises(ValueError, match="need a tokenizer: pass `processing_class=`"):
        plain_trainer(tmp_path, tokenizer, rows, AlignGuardCallback(alignment_dataset=alignment_rows))
    added_late = plain_trainer(tmp_path, tokenizer, rows)
    added_late.add_callback(guard)
    added_late.train()
    assert guard.report.mean_relative_drift > 0


def test_former_name_of_the_shrinkage_is_read():
    with pytest.warns(FutureWarning, match="`fisher_damping` is called `fisher_shrinkage` now"):
        assert AlignGuardConfig(fisher_damping=0.2).fisher_shrinkage == 0.2


@pytest.mark.parametrize("clipped", [True, False])
def test_gradients_join_unscaled_ones_in_float16(clipped):
    """What is added weighs as much whatever the loss scale, also where clipping has not taken the scale out yet."""
    parameter = torch.nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AcceleratedOptimizer(torch.optim.SGD([parameter], lr=1.0), device_placement=False, scaler=scaler)
    scaler.scale(parameter.sum()).backward()
    if clipped:
        scaler.unscale_(optimizer.optimizer)
    unscale(optimizer, clipped=clipped)
    add_gradients([parameter], [torch.full((3,), 0.5)])
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.full((3,), 1 - 1.5))


def test_gradients_become_those_of_parameters_without_any():
    used, unused = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    used.grad = torch.ones(2)
    add_gradients([used, unused], [torch.ones(2), torch.ones(2)])
    assert used.grad.tolist() == [2.0, 2.0] and unused.grad.tolist() == [1.0, 1.0]
    assert unused.grad.dtype == torch.bfloat16
