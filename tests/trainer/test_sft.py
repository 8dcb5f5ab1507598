"""AGLSFTTrainer: what it adds, and that it adds nothing when it is off."""

import json
import warnings

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from agl_trl import AGLSFTConfig, AGLSFTTrainer, DriftReport, FisherStatistics
from agl_trl.artifacts.files import ArtifactError, sha256
from agl_trl.modeling.lora import adapted_layers
from agl_trl.trainer.config import DEFAULT_KL_BUDGET
from tests.helpers.models import ARCHITECTURES, tiny_model
from tests.helpers.training import COMMON, adapter_of, agl_trainer, logged, lora


@pytest.mark.parametrize("adapter", [True, False])
def test_switched_off_it_is_sft_trainer_bit_for_bit(adapter, tmp_path, tokenizer, train_rows):
    runs = []
    for cls, config in ((SFTTrainer, SFTConfig), (AGLSFTTrainer, AGLSFTConfig)):
        off = {"alignment_coef": 0.0} if config is AGLSFTConfig else {}
        trainer = cls(
            tiny_model(),
            config(str(tmp_path / cls.__name__), **COMMON | dict(gradient_accumulation_steps=2), **off),
            train_dataset=train_rows,
            processing_class=tokenizer,
            peft_config=lora() if adapter else None,
        )
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        runs.append(trainer)
    plain, ours = runs
    for (name, a), b in zip(adapter_of(plain).items(), adapter_of(ours).values(), strict=True):
        assert torch.equal(a, b), name
    assert logged(plain) == logged(ours)
    files = [{p.name for p in (tmp_path / cls.__name__).rglob("*")} for cls in (SFTTrainer, AGLSFTTrainer)]
    assert files[0] == files[1]
    cards = [(tmp_path / cls.__name__ / "README.md").read_text() for cls in (SFTTrainer, AGLSFTTrainer)]
    assert cards[0].replace("SFTTrainer", "") == cards[1].replace("AGLSFTTrainer", "")


def test_statistics_pass_changes_nothing_but_the_penalty(tmp_path, tokenizer, train_rows, alignment_rows):
    """With a vanishing coefficient the run is plain SFT: same data order, same dropout, same weights to rounding."""
    plain = SFTTrainer(
        tiny_model(),
        SFTConfig(str(tmp_path / "plain"), **COMMON),
        train_dataset=train_rows,
        processing_class=tokenizer,
        peft_config=lora(),
    )
    plain.train()
    ours = agl_trainer(tmp_path / "ours", tokenizer, train_rows, alignment_rows, alignment_coef=1e-30)
    ours.train()
    for (name, a), b in zip(adapter_of(plain).items(), adapter_of(ours).values(), strict=True):
        assert torch.equal(a, b), name


def test_penalty_falls_as_its_weight_grows_and_base_stays_frozen(tmp_path, tokenizer, train_rows, alignment_rows):
    drifts = []
    for coef in (1e-6, 1.0, 100.0):
        trainer = agl_trainer(tmp_path / str(coef), tokenizer, train_rows, alignment_rows, alignment_coef=coef)
        frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
        trainable = adapter_of(trainer)
        trainer.train()
        drifts.append(trainer.drift_report().mean_relative_drift)
        assert all(torch.equal(p, dict(trainer.model.named_parameters())[n]) for n, p in frozen.items())
        assert all(not torch.equal(p, adapter_of(trainer)[n]) for n, p in trainable.items())
    assert drifts[0] > drifts[1] > drifts[2] > 0


def test_logged_penalty_is_the_weighted_relative_drift(tmp_path, tokenizer, train_rows, alignment_rows):
    trainer = agl_trainer(tmp_path, tokenizer, train_rows, alignment_rows, alignment_coef=2.5)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 4 and steps[0]["agl/relative_drift"] == 0.0
    for entry in steps:
        assert entry["agl/penalty"] == pytest.approx(2.5 * entry["agl/relative_drift"], rel=1e-5)
    report = trainer.drift_report()
    assert report.history["step"].tolist() == [1, 2, 3, 4]
    direct = trainer.statistics.relative_drift(trainer.model)
    assert sum(direct.values()) / len(direct) == pytest.approx(report.mean_relative_drift, rel=1e-5)
    # The report is of the weights after the last step, the log of those before it.
    assert report.mean_relative_drift != pytest.approx(steps[-1]["agl/relative_drift"], rel=1e-3)


class GradientRecorder(TrainerCallback):
    def __init__(self):
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize(("accumulation", "rows"), [(1, 8), (2, 8), (3, 20)])
def test_weight_of_the_penalty_is_exact_under_accumulation(
    tmp_path, tokenizer, train_rows, alignment_rows, accumulation, rows
):
    """
    Gradient with minus gradient without penalty is λ times the penalty's own gradient, also in an incomplete last
    window (20 rows of 4 in windows of 3). A learning rate of zero keeps both runs at the same weights.
    """
    gradients = []
    config = dict(
        gradient_accumulation_steps=accumulation, learning_rate=0.0, max_steps=-1, num_train_epochs=1, max_grad_norm=0
    )
    for coef in (1e-30, 7.0):
        model = get_peft_model(tiny_model(), lora(lora_dropout=0.0))
        trainer = AGLSFTTrainer(
            model,
            AGLSFTConfig(str(tmp_path / str(coef)), alignment_coef=coef, **COMMON | config),
            train_dataset=train_rows.select(range(rows)),
            processing_class=tokenizer,
            alignment_dataset=alignment_rows,
            callbacks=[recorder := GradientRecorder()],
        )
        torch.manual_seed(1)
        for layer in adapted_layers(trainer.model):
            torch.nn.init.normal_(layer.factors().B, std=0.1)
        trainer.train()
        gradients.append(recorder.gradients)
        assert len(recorder.gradients) == -(-rows // 4 // accumulation)
    layers = adapted_layers(trainer.model)
    trainer.model.zero_grad()
    (7.0 * trainer.statistics.drift_of(layers)([layer.factors() for layer in layers]).mean()).backward()
    expected = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    for without, with_penalty in zip(*gradients, strict=True):
        for name, gradient in expected.items():
            torch.testing.assert_close(with_penalty[name] - without[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures_train_a_step_and_save_both_files(architecture, tmp_path, tokenizer, train_rows, alignment_rows):
    targets = ARCHITECTURES[architecture][1]
    fan_in_fan_out = dict(fan_in_fan_out=True) if architecture == "gpt2" else {}
    trainer = agl_trainer(
        tmp_path,
        tokenizer,
        train_rows,
        alignment_rows,
        model=tiny_model(architecture),
        peft_config=lora(target_modules=targets, **fan_in_fan_out),
        max_steps=1,
        fisher_shrinkage=0.1,
    )
    before = adapter_of(trainer)
    trainer.train()
    trainer.save_model()
    assert any(not torch.equal(before[name], p) for name, p in adapter_of(trainer).items())
    report, statistics = DriftReport.from_pretrained(tmp_path), FisherStatistics.from_pretrained(tmp_path)
    assert report.mean_relative_drift > 0 and set(report.layers) == set(statistics.input_of)
    assert len(report.layers) == len(adapted_layers(trainer.model))


def test_rows_that_nothing_protects_are_told(tmp_path, tokenizer, train_rows, alignment_rows):
    """`anchor_coef=0` by itself switches everything off, which the name does not say."""
    with pytest.warns(UserWarning, match="switches AGL off: nothing is protected"):
        trainer = agl_trainer(tmp_path, tokenizer, train_rows, alignment_rows, anchor_coef=0.0)
    assert trainer.align_guard is None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*switches AGL off.*")
        agl_trainer(tmp_path, tokenizer, train_rows, None, anchor_coef=0.0)


def test_saved_evidence_describes_the_saved_adapter(tmp_path, tokenizer, train_rows, alignment_rows):
    trainer = agl_trainer(
        tmp_path,
        tokenizer,
        train_rows,
        alignment_rows,
        save_strategy="steps",
        save_steps=2,
        gradient_checkpointing=True,
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    fishers = set()
    for folder, step in ((tmp_path / "checkpoint-2", 2), (tmp_path / "checkpoint-4", 4), (tmp_path, 4)):
        report = DriftReport.from_pretrained(folder)
        assert report.global_step == step and report.adapter_sha256 == sha256(folder / "adapter_model.safetensors")
        assert (folder / "agl" / "drift.png").stat().st_size > 10_000
        fishers.add((folder / "agl" / "fisher.safetensors").read_bytes())
        model = PeftModel.from_pretrained(tiny_model(), folder)
        drift = FisherStatistics.from_pretrained(folder).relative_drift(model)
        assert list(drift.values()) == pytest.approx(report.relative_drift.tolist(), rel=1e-6)
    assert len(fishers) == 1, "statistics are the same bytes in every save of a run"
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card and "## Measured drift" in card and "alignguard-lora" in card
    assert "licence: license" not in card and str(tmp_path) not in card and "None" not in card
    assert "## Training procedure" in card and "2508.02079" in card
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text() == card, "the same card for the same adapter"
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(("_", "."))]


def test_a_run_from_saved_statistics_equals_one_from_the_data(tmp_path, tokenizer, train_rows, alignment_rows):
    """Published statistics are enough: no alignment row in the run, same weights, bit for bit."""
    first = agl_trainer(tmp_path / "first", tokenizer, train_rows, alignment_rows, fisher_shrinkage=0.1)
    first.train()
    first.save_model()
    second = agl_trainer(tmp_path / "second", tokenizer, train_rows, None, fisher_path=str(tmp_path / "first"))
    second.train()
    second.save_model()
    one, two = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("first", "second"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert sha256(tmp_path / "first/agl/fisher.safetensors") == sha256(tmp_path / "second/agl/fisher.safetensors")


def test_resumed_run_loads_its_statistics_and_ends_bit_identical(tmp_path, tokenizer, train_rows, alignment_rows):
    kwargs = dict(save_strategy="steps", save_steps=2)
    whole = agl_trainer(tmp_path / "run", tokenizer, train_rows, alignment_rows, **kwargs)
    whole.train()
    resumed = agl_trainer(tmp_path / "run", tokenizer, train_rows, alignment_rows, **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for (name, a), b in zip(adapter_of(whole).items(), adapter_of(resumed).values(), strict=True):
        assert torch.equal(a, b), name
    (tmp_path / "run/checkpoint-2/agl/fisher.safetensors").unlink()
    again = agl_trainer(tmp_path / "run", tokenizer, train_rows, alignment_rows, **kwargs)
    with pytest.raises(ArtifactError, match="can't be taken again"):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


@pytest.mark.parametrize(
    ("given", "extra"), [(SFTConfig, dict(max_length=77, eos_token="</s>")), (TrainingArguments, {})]
)
def test_plain_arguments_become_protected_ones(given, extra, tmp_path, tokenizer, train_rows, alignment_rows):
    args = given(str(tmp_path / "run"), hub_token="secret", **COMMON | extra)
    kwargs = dict(args=args, train_dataset=train_rows, processing_class=tokenizer, peft_config=lora())
    trainer = AGLSFTTrainer(tiny_model(), alignment_dataset=alignment_rows, **kwargs)
    assert type(trainer.args) is AGLSFTConfig and trainer.args.kl_budget == DEFAULT_KL_BUDGET
    assert trainer.args.max_steps == 4 and trainer.args.learning_rate == 1e-2 and trainer.args.hub_token == "secret"
    assert all(getattr(trainer.args, key) == value for key, value in extra.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(peft_config=None), "there is none: pass `peft_config"),
        (dict(alignment_dataset=Dataset.from_list([{"q": "a"}])), "has the columns q, which make no known format"),
        (dict(peft_config=lora(use_dora=True)), "uses the LoRA variant Dora"),
        (dict(peft_config=lora(init_lora_weights="pissa")), "init_lora_weights='pissa'"),
        (dict(peft_config=lora(target_modules=["embed_tokens"])), "no LoRA layer that AGL could guard"),
        (dict(peft_config=lora(lora_bias=True)), "trains a LoRA bias"),
        (dict(peft_config=lora(bias="all")), "trains biases of the base model"),
        (
            dict(
                peft_config=lora(target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"], lora_dropout=0)
            ),
            "guards linear layers only",
        ),
    ],
)
def test_bad_input_gets_one_sentence_at_construction(change, message, tmp_path, tokenizer, train_rows, alignment_rows):
    kwargs = dict(
        model=None,
        train_dataset=train_rows,
        processing_class=tokenizer,
        peft_config=lora(),
        alignment_dataset=alignment_rows,
    )
    kwargs |= change
    kwargs["model"] = kwargs["model"] or tiny_model()
    with pytest.raises(ValueError, match=message):
        AGLSFTTrainer(args=AGLSFTConfig(str(tmp_path), **COMMON), **kwargs)


def test_output_folder_that_cannot_be_written_is_told_before_training(tmp_path, tokenizer, train_rows, alignment_rows):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Cannot write '.*file/run"):
        agl_trainer(tmp_path / "file" / "run", tokenizer, train_rows, alignment_rows)


def test_statistics_of_another_model_name_the_difference(tmp_path, tokenizer, train_rows, alignment_rows):
    trainer = agl_trainer(
        tmp_path / "a", tokenizer, train_rows, alignment_rows, peft_config=lora(target_modules=["q_proj"])
    )
    trainer.train()
    trainer.save_model()
    kwargs = dict(fisher_path=str(tmp_path / "a"))

    def build(model=None, targets=("q_proj",)):
        peft_config = lora(target_modules=list(targets))
        return agl_trainer(tmp_path / "b", tokenizer, train_rows, None, model=model, peft_config=peft_config, **kwargs)

    build()
    with pytest.raises(ArtifactError, match="cover 2 layers, but not 'model.layers.0.self_attn.v_proj'"):
        build(targets=("q_proj", "v_proj"))
    with pytest.raises(ArtifactError, match="hidden_size is 32 there and 64 here"):
        build(tiny_model(hidden_size=64))
    heavier = tiny_model()
    with torch.no_grad():
        heavier.model.layers[1].self_attn.q_proj.weight *= 1.2
    with pytest.raises(ArtifactError, match="of other weights: the norm of layer 'model.layers.1.self_attn.q_proj'"):
        build(heavier)
    nearly = tiny_model()
    with torch.no_grad():
        nearly.model.layers[1].self_attn.q_proj.weight *= 1.01
    build(nearly)


def test_several_splits_are_refused_by_name(tmp_path, tokenizer, train_rows, alignment_rows):
    with pytest.raises(TypeError, match="has the splits train, test: pass one of them"):
        agl_trainer(tmp_path, tokenizer, train_rows, DatasetDict(train=alignment_rows, test=alignment_rows))


def test_layer_without_scale_is_named(tmp_path, tokenizer, train_rows, alignment_rows):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    trainer = agl_trainer(tmp_path, tokenizer, train_rows, alignment_rows, model=model)
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.(up|down)_proj' has the weight norm 0"):
        trainer.train()


def test_best_model_is_reported_with_its_own_step(tmp_path, tokenizer, train_rows, alignment_rows):
    class OneGoodStep(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = abs(state.global_step - 2.0)

    kwargs = dict(
        save_strategy="steps", eval_strategy="steps", save_steps=1, eval_steps=1, load_best_model_at_end=True
    )
    trainer = AGLSFTTrainer(
        tiny_model(),
        AGLSFTConfig(str(tmp_path), metric_for_best_model="eval_loss", greater_is_better=False, **COMMON | kwargs),
        train_dataset=train_rows,
        eval_dataset=train_rows,
        processing_class=tokenizer,
        peft_config=lora(),
        alignment_dataset=alignment_rows,
        callbacks=[OneGoodStep()],
    )
    trainer.train()
    best = DriftReport.from_pretrained(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    report = trainer.drift_report()
    assert report.global_step == best.global_step == trainer.state.best_global_step
    assert report.relative_drift.tolist() == best.relative_drift.tolist()


def test_plain_checkpoint_goes_on_under_agl_from_saved_statistics(tmp_path, tokenizer, train_rows, alignment_rows):
    """As the error for missing statistics advises: a run that began without AGL is continued with `fisher_path`."""
    first = agl_trainer(tmp_path / "statistics", tokenizer, train_rows, alignment_rows, max_steps=1)
    first.train()
    first.save_model()
    plain = SFTTrainer(
        tiny_model(),
        SFTConfig(str(tmp_path / "run"), **COMMON | dict(save_strategy="steps", save_steps=2)),
        train_dataset=train_rows,
        processing_class=tokenizer,
        peft_config=lora(),
    )
    plain.train()
    ours = agl_trainer(
        tmp_path / "run", tokenizer, train_rows, None, fisher_path=str(tmp_path / "statistics"), drift_budget=1e-3
    )
    ours.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert 0 < ours.drift_report().mean_relative_drift <= 1e-3


def test_answers_measured_once_stay_with_the_same_weights(tmp_path, tokenizer, train_rows, alignment_rows):
    trainer = agl_trainer(tmp_path, tokenizer, train_rows, alignment_rows)
    trainer.train()
    report = trainer.drift_report(prompts=alignment_rows, max_new_tokens=3, progress=False)
    trainer.save_model()
    saved = DriftReport.from_pretrained(tmp_path)
    assert torch.equal(saved.behaviour.kl_first_tokens, report.behaviour.kl_first_tokens)


def test_without_a_word_on_what_to_keep_driftcaps_is_kept(tmp_path, tokenizer, train_rows, caplog, monkeypatch):
    """The requests of the protection split, with the model's own answers; here a handful of short ones."""
    from agl_trl.driftcaps import load_driftcaps
    from agl_trl.modeling import generation as behaviour

    answers = behaviour.generate_answers
    monkeypatch.setattr(
        behaviour, "generate_answers", lambda *args, **kwargs: answers(*args, **kwargs | dict(max_new_tokens=2))
    )
    trainer = agl_trainer(
        tmp_path, tokenizer, train_rows, None, max_steps=2, fisher_num_samples=12, num_reference_answers=8
    )
    assert "DriftCaps" in caplog.text
    asked = {row["prompt"][-1]["content"] for row in trainer.align_guard.alignment_dataset}
    assert asked == {row["prompt"] for row in load_driftcaps("protect")}
    trainer.train()
    assert sorted(trainer.align_guard.references.kinds) == 4 * ["alignment/comply"] + 4 * ["alignment/refuse"]
    assert trainer.statistics.metadata["num_rows"] == 12 and trainer.drift_report().mean_relative_drift > 0
