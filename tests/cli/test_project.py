"""`agl-trl project`: a copy within the budget, with evidence of its own, and the original untouched."""

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig
from safetensors.torch import load_file

from agl_trl import DriftReport, FisherStatistics
from agl_trl.artifacts.files import sha256
from agl_trl.evaluation.behaviour import measure_behaviour
from agl_trl.miniworld import heldout_prompts, load_model, load_tokenizer
from tests.helpers.commands import command
from tests.helpers.models import moved_by


def test_command_writes_a_projected_copy(demo_folder, tmp_path, monkeypatch, capsys):
    source, target = demo_folder / "lora", tmp_path / "repaired"
    before = sha256(source / "adapter_model.safetensors")
    arguments = ("project", source, "--base", "miniworld", "--fisher", demo_folder, "--budget", 1e-4)
    code, out, err = command(monkeypatch, capsys, *arguments, "--output-dir", target)
    assert code == 0 and "before:" in out and "after:" in out, err
    assert sha256(source / "adapter_model.safetensors") == before
    report = DriftReport.from_pretrained(target)
    assert report.mean_relative_drift <= 1e-4 and report.metadata["projected"]["budget"] == 1e-4
    assert report.adapter_sha256 == sha256(target / "adapter_model.safetensors")
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (source, target))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) == ("lora_B" in name) for name in old)
    model = PeftModel.from_pretrained(load_model(), target)
    drift = FisherStatistics.from_pretrained(target).relative_drift(model)
    assert sum(drift.values()) / len(drift) == pytest.approx(report.mean_relative_drift, rel=1e-4)
    prompts = heldout_prompts().select(range(0, 384, 16))
    kls = [
        measure_behaviour(
            PeftModel.from_pretrained(load_model(), folder),
            load_tokenizer(),
            prompts,
            max_new_tokens=8,
            progress=False,
        ).mean_kl(True)
        for folder in (source, target)
    ]
    assert kls[1] < kls[0]
    for name in ("agl/drift.png", "agl/fisher.safetensors", "adapter_config.json"):
        assert (target / name).is_file()
    code, _, err = command(monkeypatch, capsys, *arguments, "--output-dir", source)
    assert code == 2 and "must not overwrite" in err


@pytest.mark.parametrize("budget", ["0", "-1", "nan"])
def test_a_budget_that_is_none_is_told_before_anything_is_loaded(budget, tmp_path, monkeypatch, capsys):
    arguments = ("project", "gone/adapter", "--base", "gone", "--output-dir", tmp_path / "out", "--budget", budget)
    code, _, err = command(monkeypatch, capsys, *arguments)
    assert code == 2 and "`--budget` must be above 0" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoHaConfig(r=2, target_modules=["q_proj"]), "is of type LOHA"),
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "is of type PROMPT_TUNING"),
        (LoraConfig(use_dora=True, target_modules=["q_proj"]), "uses the LoRA variant Dora"),
        (LoraConfig(target_modules=["embed_tokens"]), "has none"),
    ],
)
def test_an_adapter_without_factors_of_linear_layers_is_refused(
    config, reason, demo_folder, tmp_path, monkeypatch, capsys
):
    moved_by(load_model(), config).save_pretrained(tmp_path / "adapter")
    options = ("--base", "miniworld", "--fisher", demo_folder, "--budget", 1e-4, "--output-dir", tmp_path / "out")
    code, _, err = command(monkeypatch, capsys, "project", tmp_path / "adapter", *options)
    last = err.splitlines()[-1]
    assert code == 2 and "can be shrunk" in last and reason in last and not (tmp_path / "out").exists(), err
