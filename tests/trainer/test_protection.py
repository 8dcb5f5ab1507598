"""What holds the KL of protected rows: while a run trains, at its end, and in what it saves and resumes."""

import copy
import logging

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import TrainerCallback

from agl_trl import AGLSFTConfig, AGLSFTTrainer, AlignGuardConfig, DriftReport, FisherStatistics
from agl_trl.artifacts.files import sha256
from agl_trl.data.alignment import tokenize_rows
from agl_trl.fisher.reference_answers import ReferenceAnswers
from agl_trl.modeling.lora import adapted_layers, at_reference, linear_layers
from agl_trl.trainer.anchor import Anchor
from agl_trl.trainer.gradients import add_capped, norm_of
from agl_trl.trainer.protection import AIM, Protection, scaling
from tests.helpers.models import chat_rows
from tests.helpers.training import COMMON, adapter_of, agl_trainer, lora, telling_model


def measured(tokenizer, model, kinds) -> ReferenceAnswers:
    rows = tokenize_rows(chat_rows(len(kinds), "please do bad thing", "Sorry, no {}."), tokenizer)
    with at_reference(model, []):
        return ReferenceAnswers.measure(model, tokenizer, rows, kinds, progress=False)


KINDS = ["alignment/refuse"] * 5 + ["alignment/comply"] * 4 + ["chat"] * 2


def test_rows_of_a_step_depend_on_the_step_alone_and_kinds_take_turns(tokenizer):
    references = measured(tokenizer, get_peft_model(telling_model(), lora()), KINDS)
    anchor, other = Anchor(references, 2, 4, 0), Anchor(references, 2, 4, 0)
    for step in (8, 2, 0, 6, 4):  # in any order
        other.rows("alignment", step)
    steps = [anchor.rows("alignment", step) for step in range(0, 60, 2)]
    assert steps == [other.rows("alignment", step) for step in range(0, 60, 2)]
    for rows in steps:
        assert [KINDS[i] for i in rows] == ["alignment/comply", "alignment/refuse"] * 2
        assert {*anchor.rows("chat", 4)} == {9, 10}, "no more rows than there are"
    visits = torch.tensor(steps).flatten().bincount(minlength=9)
    assert visits[:5].tolist() == [12] * 5 and visits[5:9].tolist() == [15] * 4, "every row of a kind alike"
    assert [anchor.due(step) for step in range(5)] == [True, False, True, False, True]
    assert steps != [Anchor(references, 2, 4, 1).rows("alignment", step) for step in range(0, 60, 2)]
    single = Anchor(references, 1, 1, 0)
    assert [KINDS[single.rows("alignment", step)[0]] for step in (0, 1, 2)] == [
        "alignment/comply",
        "alignment/refuse",
        "alignment/comply",
    ]


@pytest.mark.parametrize("present", [0.0, 0.1, 3.0, 1e4])
def test_what_is_added_is_never_longer_than_what_is_there(present):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]
    for parameter in parameters:
        parameter.grad = present * torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in parameters]
    gradients = [torch.randn_like(parameter) for parameter in parameters]
    add_capped(parameters, gradients, 0.6, norm_of(gradients))
    added = [parameter.grad - held for parameter, held in zip(parameters, before, strict=True)]
    weight = min(0.6, (norm_of(before) / norm_of(gradients)).item())
    assert norm_of(added) <= norm_of(before) * (1 + 1e-5)
    for change, gradient in zip(added, gradients, strict=True):
        torch.testing.assert_close(change, weight * gradient, rtol=1e-4, atol=1e-3 if present > 1e3 else 1e-6)


def moved_model(tokenizer, scale: float) -> tuple[PeftModel, ReferenceAnswers]:
    model = get_peft_model(telling_model(), lora(lora_dropout=0.0))
    references = measured(tokenizer, model, ["alignment"] * 4)
    torch.manual_seed(1)
    for layer in adapted_layers(model):
        torch.nn.init.normal_(layer.parameters()[1], std=scale)
    return model, references


def test_projection_brings_the_kl_of_its_rows_to_the_aim(tokenizer):
    """At first order, so that it arrives from near; from afar it comes nearer at every anchored step."""
    model, references = moved_model(tokenizer, 0.02)
    kl = references.kl(model)[:, 0].mean().item()
    layers = adapted_layers(model)
    near = AlignGuardConfig(kl_budget=0.95 * kl / AIM, anchor_coef=0.0, anchor_every=1)
    logged = Protection(near, references, layers, 0).protect(model, 0)
    assert logged["kl"].item() == pytest.approx(kl, rel=1e-5) and logged["kl_step"] > 0
    assert references.kl(model)[:, 0].mean().item() == pytest.approx(0.95 * kl, rel=0.005)
    far = Protection(AlignGuardConfig(kl_budget=0.1 * kl, anchor_every=1), references, layers, 0)
    seen = [far.protect(model, step)["kl"].item() for step in range(12)]
    assert seen == sorted(seen, reverse=True) and seen[-1] == pytest.approx(0.05 * kl, rel=1e-4)
    within = Protection(AlignGuardConfig(kl_budget=kl, anchor_every=1), references, layers, 0)
    before = adapter_of_model(model)
    assert within.protect(model, 0)["kl_step"] == 0 and within.protect(model, 1)
    assert all(torch.equal(value, before[name]) for name, value in adapter_of_model(model).items())
    skipping = Protection(AlignGuardConfig(kl_budget=0.001 * kl, anchor_every=2), references, layers, 0)
    assert skipping.protect(model, 1) == {}


def test_layers_that_fsdp_wraps_for_its_checkpointing_are_the_same_layers(tokenizer):
    """By name, when training begins, and by gradient: they run again in the backward pass, as in the forward pass without dropout."""
    plain, references = moved_model(tokenizer, 0.02)
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    wrapped = copy.deepcopy(plain)
    named = [layer.name for layer in adapted_layers(wrapped)], [*linear_layers(wrapped)]
    layers = wrapped.get_base_model().model.layers
    for number, layer in enumerate(layers):
        layers[number] = checkpoint_wrapper(layer, preserve_rng_state=False)
    assert ([layer.name for layer in adapted_layers(wrapped)], [*linear_layers(wrapped)]) == named
    for model in (plain, wrapped):
        model.train()
        protection = Protection(AlignGuardConfig(kl_budget=1e-4, anchor_every=1), references, adapted_layers(model), 0)
        assert protection.protect(model, 0)["kl_step"] > 0
    pairs = zip(adapter_of_model(plain).values(), adapter_of_model(wrapped).values(), strict=True)
    assert all(torch.equal(ours, others) for ours, others in pairs)
    assert all(module.training for module in wrapped.modules())


def adapter_of_model(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_kl_that_is_no_number_changes_nothing(tokenizer, caplog):
    model, references = moved_model(tokenizer, 0.02)
    layers = adapted_layers(model)
    references.log_probs[2][0, 0] = torch.nan
    before = adapter_of_model(model)
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
            gradients[name] = parameter.grad.clone()
    protection = Protection(AlignGuardConfig(kl_budget=1e-4, anchor_every=1), references, layers, 0)
    logged = protection.protect(model, 0)
    assert logged["kl"].isnan() and logged["penalty"] == 0 and logged["kl_step"] == 0
    with caplog.at_level(logging.WARNING):
        protection.hold(model)
    assert "The KL budget is not held: the KL is no number" in caplog.text
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, before[name]) and torch.equal(parameter.grad, gradients[name]), name
    assert protection.described() == {"behaviours": {"alignment": {"budget": 1e-4}}, "scale": 1.0}


def test_a_behaviour_that_is_no_number_is_not_hidden_by_another(tokenizer, caplog):
    model, references = moved_model(tokenizer, 0.02)
    references.kinds[2:] = ["chat"] * 2
    references.log_probs[2][0, 0] = torch.nan
    protection = Protection(AlignGuardConfig(kl_budget=100.0), references, adapted_layers(model), 0)
    with caplog.at_level(logging.WARNING):
        protection.hold(model)
    assert "the KL is no number" in caplog.text


FAST = dict(learning_rate=3e-2, max_steps=10, anchor_every=5)
UNHELD = FAST | dict(trust_radius=None)  # so that the end is far beyond the budget


def test_at_the_end_the_kl_of_all_rows_is_within_the_budget(tmp_path, tokenizer, opposite_rows, mixed_rows, caplog):
    free = agl_trainer(tmp_path / "free", tokenizer, opposite_rows, mixed_rows, telling_model(), kl_budget=1e3, **FAST)
    free.train()
    assert free.align_guard.protection.scale == 1.0
    assert free.align_guard.references.kl(free.model)[:, 0].mean() > 0.1 and "was shrunk" not in caplog.text
    trainer = agl_trainer(tmp_path, tokenizer, opposite_rows, mixed_rows, telling_model(), kl_budget=0.02, **UNHELD)
    trainer.train()
    guard = trainer.align_guard
    assert guard.protection.scale < 0.5
    assert f"The update was shrunk to {guard.protection.scale:.0%} of itself to keep the KL budget" in caplog.text
    assert sorted(guard.references.kinds) == ["alignment/comply"] * 4 + ["alignment/refuse"] * 6
    kl = guard.references.kl(trainer.model)
    assert guard.protection.scale < 1 and 0.95 * 0.02 <= kl[:, 0].mean().item() <= 0.02
    report = trainer.drift_report()
    kept = report.metadata["protected"]
    told = kept["behaviours"]["alignment"]
    assert told["kl"] == pytest.approx(kl[:, 0].mean().item(), rel=1e-6) and told["rows"] == 10
    assert told["kl_first_tokens"] == pytest.approx(kl[:, 1].mean().item(), rel=1e-6)
    for kind in ("refuse", "comply"):
        rows = guard.references.where(f"alignment/{kind}")
        assert told["kinds"][kind] == pytest.approx(kl[rows, 0].mean().item(), rel=1e-6)
    assert kept["scale"] == guard.protection.scale and told["budget"] == 0.02
    trainer.save_model()
    saved = DriftReport.from_pretrained(tmp_path)
    assert saved.metadata["protected"] == kept
    saved.check_describes(tmp_path)
    published = ReferenceAnswers.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(telling_model(), tmp_path)
    assert published.kl(loaded)[:, 0].mean().item() == pytest.approx(told["kl"], rel=1e-4)
    assert all("agl/kl" in entry for entry in trainer.state.log_history if entry.get("step") in (1, 6))


def test_the_best_checkpoint_is_what_is_held(tmp_path, tokenizer, opposite_rows, mixed_rows):
    best = dict(save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)
    trainer = AGLSFTTrainer(
        telling_model(),
        AGLSFTConfig(str(tmp_path), kl_budget=0.02, **COMMON | FAST | best),
        train_dataset=opposite_rows,
        eval_dataset=mixed_rows.select_columns(
            ["prompt", "completion"]
        ),  # the first is the best: training goes away from them
        processing_class=tokenizer,
        peft_config=lora(),
        alignment_dataset=mixed_rows,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3") and trainer.state.global_step == 10
    scale = trainer.align_guard.protection.scale
    kl = trainer.align_guard.references.kl(trainer.model)[:, 0].mean().item()
    assert 0 < scale < 1 and 0.95 * 0.02 <= kl <= 0.02
    saved = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    for name, value in adapter_of(trainer).items():
        there = saved[name.replace(".default", "")]
        torch.testing.assert_close(value, there if "lora_A" in name else scale * there, msg=name)


def test_last_checkpoint_holds_the_budget_as_the_end_does(tmp_path, tokenizer, opposite_rows, mixed_rows):
    # Front ends leave it as their result.
    saving = dict(save_strategy="steps", save_steps=6)
    trainer = agl_trainer(
        tmp_path, tokenizer, opposite_rows, mixed_rows, telling_model(), kl_budget=0.02, **UNHELD | saving
    )
    trainer.train()
    references, kl = trainer.align_guard.references, {}
    for step in (6, 10):
        loaded = PeftModel.from_pretrained(telling_model(), tmp_path / f"checkpoint-{step}")
        kl[step] = references.kl(loaded)[:, 0].mean().item()
    assert kl[10] <= 0.02 < kl[6]
    kept = DriftReport.from_pretrained(tmp_path / "checkpoint-10").metadata["protected"]
    assert kept["scale"] == trainer.align_guard.protection.scale < 1
    assert kept["behaviours"]["alignment"]["kl"] == pytest.approx(kl[10], rel=1e-4)


def test_the_best_weights_at_the_last_step_hold_the_budget_too(tmp_path, tokenizer, opposite_rows, mixed_rows):
    """They are known to be the best after the step has ended, and are saved at once."""
    best = dict(save_strategy="best", metric_for_best_model="loss", eval_strategy="steps", eval_steps=10)
    trainer = AGLSFTTrainer(
        telling_model(),
        AGLSFTConfig(str(tmp_path), kl_budget=0.02, **COMMON | UNHELD | best),
        train_dataset=opposite_rows,
        eval_dataset=opposite_rows,
        processing_class=tokenizer,
        peft_config=lora(),
        alignment_dataset=mixed_rows,
    )
    trainer.train()
    assert trainer.align_guard.protection.scale < 1
    loaded = PeftModel.from_pretrained(telling_model(), tmp_path / "checkpoint-10")
    assert trainer.align_guard.references.kl(loaded)[:, 0].mean().item() <= 0.02


def test_a_continued_adapter_is_drawn_back_to_where_it_started(tmp_path, tokenizer, opposite_rows, mixed_rows):
    model, _ = moved_model(tokenizer, 0.02)
    start = adapter_of_model(model)
    ends = []

    class End(TrainerCallback):  # after the last step, before the guarantee
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == args.max_steps:
                ends.append(adapter_of_model(model))

    trainer = agl_trainer(tmp_path, tokenizer, opposite_rows, mixed_rows, model, kl_budget=0.02, **UNHELD)
    trainer.add_callback(End())
    trainer.train()
    guard = trainer.align_guard
    scale = guard.protection.scale
    assert 0 < scale < 1 and 0.95 * 0.02 <= guard.references.kl(model)[:, 0].mean().item() <= 0.02
    for name, value in adapter_of(trainer).items():
        torch.testing.assert_close(value, start[name] + scale * (ends[0][name] - start[name]), msg=name)
    with at_reference(model, guard.layers):
        assert guard.references.kl(model).abs().max() < 1e-5
    assert trainer.drift_report().metadata["continued"]


def test_what_is_trained_beside_lora_cannot_be_shrunk_and_is_told(
    tmp_path, tokenizer, opposite_rows, mixed_rows, caplog
):
    config = lora(modules_to_save=["lm_head"])
    options = dict(peft_config=config, kl_budget=0.002, **FAST)
    trainer = agl_trainer(tmp_path, tokenizer, opposite_rows, mixed_rows, telling_model(), **options)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "The KL budget is not held: what was trained beside LoRA exceeds it by itself." in caplog.text
    kept = trainer.drift_report().metadata["protected"]
    kl = trainer.align_guard.references.kl(trainer.model)[:, 0].mean().item()
    assert kept["scale"] == 1.0 and kept["behaviours"]["alignment"]["kl"] == pytest.approx(kl, rel=1e-6) and kl > 0.002


def test_scaling_ends_where_it_began_bit_for_bit(tokenizer):
    model, _ = moved_model(tokenizer, 0.02)
    before = adapter_of_model(model)
    for layers in (adapted_layers(model), [layer.with_reference() for layer in adapted_layers(model)]):
        move_to = scaling(layers)
        for scale in (0.3, 0.0, 1.0):
            move_to(scale)
        assert all(torch.equal(value, before[name]) for name, value in adapter_of_model(model).items())


class Stopped(Exception):
    pass


def test_resumed_run_ends_bit_identical_and_an_interrupted_one_leaves_its_answers(
    tmp_path, tokenizer, opposite_rows, mixed_rows
):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise Stopped

    def build(folder, rows=mixed_rows):
        options = dict(learning_rate=3e-2, kl_budget=0.02, save_strategy="steps", save_steps=3, max_steps=6)
        chat = {"chat": chat_rows(3, "say", "well, {}")}
        return agl_trainer(folder, tokenizer, opposite_rows, rows, telling_model(), protect=chat, **options)

    whole = build(tmp_path / "whole")
    whole.train()
    interrupted = build(tmp_path / "interrupted")
    interrupted.add_callback(Stop())
    with pytest.raises(Stopped):
        interrupted.train()
    checkpoint = tmp_path / "interrupted" / "checkpoint-3"
    kept = ReferenceAnswers.from_pretrained(checkpoint / "agl" / "reference_answers.safetensors")
    assert kept.kinds == whole.align_guard.references.kinds and kept.behaviours == ["alignment", "chat"]
    resumed = build(tmp_path / "interrupted")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert whole.align_guard.protection.scale == resumed.align_guard.protection.scale < 1
    for (name, a), b in zip(adapter_of(whole).items(), adapter_of(resumed).values(), strict=True):
        assert torch.equal(a, b), name
    whole.save_model()
    resumed.save_model()
    for file in ("reference_answers", "fisher"):
        ends = [sha256(tmp_path / run / "agl" / f"{file}.safetensors") for run in ("whole", "interrupted")]
        assert ends[0] == ends[1], file
    assert FisherStatistics.from_pretrained(checkpoint).metadata["kl_curve"]


def test_rows_that_a_resumed_run_adds_are_answered_at_the_reference_and_held(
    tmp_path, tokenizer, opposite_rows, mixed_rows
):
    def build(protect):
        options = dict(learning_rate=3e-2, kl_budget=0.02, save_strategy="steps", save_steps=3, max_steps=6)
        return agl_trainer(tmp_path, tokenizer, opposite_rows, mixed_rows, telling_model(), protect=protect, **options)

    build({"chat": chat_rows(3, "say", "well, {}")}).train()
    kept = ReferenceAnswers.from_pretrained(tmp_path / "checkpoint-3")
    changed = {
        "chat": chat_rows(2, "oh", "no, {}"),
        "text": [{"text": f"It was a dark night, {i}."} for i in range(4)],
    }
    resumed = build(changed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    guard = resumed.align_guard
    assert guard.references.behaviours == ["alignment", "chat", "text"]
    assert guard.references.rows[:13] == kept.rows, "the others go on as they were"
    assert all(map(torch.equal, guard.references.log_probs[:13], kept.log_probs))
    assert len(guard.references.where("text")) == 4
    with at_reference(resumed.model, guard.layers), torch.no_grad():
        assert guard.references.kl(resumed.model).abs().max() < 1e-5
    assert {*guard.protection.measured} == {"alignment", "chat", "text"}
    assert all(0 < of["kl"] <= 0.02 for of in guard.protection.measured.values())
