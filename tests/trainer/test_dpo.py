"""AGLDPOTrainer: TRL's DPO with the guard on, and TRL's DPO where it is off."""

from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from trl import DPOConfig, DPOTrainer

from agl_trl import AGLDPOConfig, AGLDPOTrainer, DriftReport, FisherStatistics
from agl_trl.artifacts.files import sha256
from agl_trl.modeling.lora import adapted_layers
from tests.helpers.models import preference_rows, tiny_model
from tests.helpers.training import COMMON, adapter_of, logged, lora


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    return Dataset.from_list(preference_rows(12, "say", "the number is {}", "no idea {}"))


@pytest.fixture(scope="module")
def safety() -> Dataset:
    return Dataset.from_list(preference_rows(6, "please do bad thing", "Sorry, no {}.", "Sure {}"))


def moved_model(std=0.1):
    """A model whose adapter was already trained."""
    model = get_peft_model(tiny_model(), lora(lora_dropout=0.0))
    torch.manual_seed(3)
    for layer in adapted_layers(model):
        torch.nn.init.normal_(layer.parameters()[1], std=std)
    return model


def trainer_of(path, tokenizer, pairs, safety, model=None, peft=True, **config):
    config = COMMON | dict(max_steps=3) | config
    return AGLDPOTrainer(
        model if model is not None else tiny_model(),
        args=AGLDPOConfig(str(path), **config),
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=lora() if peft else None,
        alignment_dataset=safety,
    )


LOSSES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_types_train_under_guard(loss_type, tmp_path, tokenizer, pairs, safety):
    smoothing = dict(label_smoothing=0.1) if loss_type in ("exo_pair", "robust") else {}
    trainer = trainer_of(tmp_path, tokenizer, pairs, safety, loss_type=[loss_type], **smoothing)
    trainer.train()
    entry = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    assert entry["agl/relative_drift"] > 0 and "rewards/margins" in entry


def test_statistics_are_those_of_prompt_and_chosen_answer(tmp_path, tokenizer, pairs, safety):
    trainer = trainer_of(tmp_path / "pairs", tokenizer, pairs, safety, max_steps=1)
    trainer.train()
    completions = safety.rename_column("chosen", "completion").remove_columns("rejected")
    other = trainer_of(tmp_path / "completions", tokenizer, pairs, completions, max_steps=1)
    other.train()
    for name, X in trainer.statistics.inputs.items():
        assert torch.equal(X.eigenvalues, other.statistics.inputs[name].eigenvalues)


def test_stronger_penalty_less_drift_and_evidence_beside_the_adapter(tmp_path, tokenizer, pairs, safety):
    drifts = []
    for coef in (1e-6, 100.0):
        folder = tmp_path / str(coef)
        trainer = trainer_of(folder, tokenizer, pairs, safety, alignment_coef=coef, task_subspace="task")
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        report = DriftReport.from_pretrained(folder)
        assert report.adapter_sha256 == sha256(folder / "adapter_model.safetensors")
        drifts.append(report.mean_relative_drift)
    assert drifts[0] > drifts[1] > 0
    assert "## Measured drift" in (folder / "README.md").read_text()


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_references_are_those_of_the_parent(precompute, explicit, tmp_path, tokenizer, pairs, safety):
    """With a vanishing coefficient the run is TRL's own, with implicit, explicit and precomputed reference."""
    runs = []
    for trainer_class, config_class, ours in (
        (DPOTrainer, DPOConfig, {}),
        (AGLDPOTrainer, partial(AGLDPOConfig, alignment_coef=1e-30), dict(alignment_dataset=safety)),
    ):
        trainer = trainer_class(
            tiny_model(),
            tiny_model(seed=5) if explicit else None,
            config_class(str(tmp_path / trainer_class.__name__), **COMMON | dict(precompute_ref_log_probs=precompute)),
            train_dataset=pairs,
            processing_class=tokenizer,
            peft_config=lora(),
            **ours,
        )
        trainer.train()
        runs.append(adapter_of(trainer))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_already_adapted_model_is_guarded_from_where_it_started_and_its_copy_never_saved(
    tmp_path, tokenizer, pairs, safety
):
    """TRL adds a frozen copy `ref`: only the active adapter is guarded, and `ref/` is in no folder."""
    settings = dict(
        peft=False, save_strategy="steps", save_steps=2, max_steps=4, drift_budget=1e-4, learning_rate=1e-3
    )
    trainer = trainer_of(tmp_path, tokenizer, pairs, safety, moved_model(), **settings)
    assert set(trainer.model.peft_config) == {"default", "ref"}
    assert {layer.adapter for layer in trainer.align_guard.layers} == {"default"}
    copy = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".ref." in n}
    trainer.train()
    trainer.save_model()
    assert trainer.drift_report().mean_relative_drift > 0
    assert all(torch.equal(p, dict(trainer.model.named_parameters())[n]) for n, p in copy.items())
    assert not list(tmp_path.rglob("ref"))
    resumed = trainer_of(tmp_path, tokenizer, pairs, safety, moved_model(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trained = {n: p for n, p in trainer.model.named_parameters() if ".default." in n}
    for name, value in resumed.model.named_parameters():
        if ".default." in name:
            assert torch.equal(value, trained[name]), name
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert set(reloaded.peft_config) == {"default"}


def test_resumed_run_ends_bit_identical(tmp_path, tokenizer, pairs, safety):
    settings = dict(save_strategy="steps", save_steps=2, max_steps=4, drift_budget=1e-3, anchor_coef=0.1)
    whole = trainer_of(tmp_path, tokenizer, pairs, safety, **settings)
    whole.train()
    resumed = trainer_of(tmp_path, tokenizer, pairs, safety, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, a), b in zip(adapter_of(whole).items(), adapter_of(resumed).values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("adapter", [True, False])
def test_switched_off_it_is_dpo_trainer_bit_for_bit(adapter, tmp_path, tokenizer, pairs):
    runs = []
    for cls, config in ((DPOTrainer, DPOConfig), (AGLDPOTrainer, AGLDPOConfig)):
        off = {"alignment_coef": 0.0} if config is AGLDPOConfig else {}
        trainer = cls(
            tiny_model(),
            ref_model=None if adapter else tiny_model(),
            args=config(str(tmp_path / cls.__name__), **COMMON, **off),
            train_dataset=pairs,
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
    files = [{p.name for p in (tmp_path / cls.__name__).rglob("*")} for cls in (DPOTrainer, AGLDPOTrainer)]
    assert files[0] == files[1]
    cards = [(tmp_path / cls.__name__ / "README.md").read_text() for cls in (DPOTrainer, AGLDPOTrainer)]
    assert cards[0].replace("DPOTrainer", "") == cards[1].replace("AGLDPOTrainer", "")


def test_plain_and_missing_arguments_are_protected(tmp_path, tokenizer, pairs, safety, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = AGLDPOTrainer(
        tiny_model(),
        None,
        DPOConfig(str(tmp_path / "given"), beta=0.3, **COMMON),
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=lora(),
        alignment_dataset=safety,
    )
    assert isinstance(trainer.args, AGLDPOConfig) and trainer.args.beta == 0.3 and trainer.args.agl_enabled
    with pytest.raises(TypeError, match="unexpected keyword argument 'alignment_data'"):
        AGLDPOTrainer(tiny_model(), alignment_data=safety)


def test_published_statistics_serve_both_trainers(tmp_path, tokenizer, pairs, safety, train_rows):
    from tests.helpers.training import agl_trainer

    sft = agl_trainer(tmp_path / "sft", tokenizer, train_rows, safety)
    sft.train()
    sft.save_model()
    trainer = trainer_of(tmp_path / "dpo", tokenizer, pairs, None, fisher_path=str(tmp_path / "sft"))
    trainer.train()
    trainer.save_model()
    names = "sft", "dpo"
    assert len({sha256(tmp_path / name / "agl" / "fisher.safetensors") for name in names}) == 1
    assert FisherStatistics.from_pretrained(tmp_path / "dpo").num_tokens == sft.statistics.num_tokens
