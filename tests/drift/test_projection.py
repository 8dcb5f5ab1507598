"""Projection of a trained adapter: the formula against a dense solve, the budget kept, the copy whole, the original untouched."""

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from agl_trl import DriftReport, FisherStatistics, estimate_fisher
from agl_trl.drift.projection import projected_factor, strength_for, write_projected
from agl_trl.miniworld import load_model
from agl_trl.modeling.loading import load_adapter
from agl_trl.modeling.lora import adapted_layers
from tests.helpers.commands import command
from tests.helpers.models import moved_adapter, tiny_vision_language_model
from tests.helpers.reference import dense, low_rank


def test_shrinking_equals_a_dense_solve_and_minimises_what_it_says():
    """`A (I + νX/λ̄)⁻¹`, which is the minimum of `‖ΔW′ − ΔW‖² + ν‖ΔW′‖²_X / λ̄`."""
    X = low_rank(14, 5, 0)
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 14, generator=generator).double(), torch.randn(10, 3, generator=generator).double()
    strength, normalised = 2.5, dense(X) / (torch.trace(dense(X)) / 14)
    moved = projected_factor(A, X, strength)
    expected = torch.linalg.solve(torch.eye(14).double() + strength * normalised, A.T).T
    torch.testing.assert_close(moved, expected, rtol=1e-10, atol=1e-12)
    delta = (B @ moved).requires_grad_()
    loss = (delta - B @ A).square().sum() + strength * torch.trace(delta @ normalised @ delta.T)
    (gradient,) = torch.autograd.grad(loss, delta)
    assert gradient.abs().max() < 1e-10
    assert torch.equal(projected_factor(A, X, 0.0), A)


def test_budget_is_kept_tightly_and_monotonically(demo_folder):
    statistics = FisherStatistics.from_pretrained(demo_folder)
    model = PeftModel.from_pretrained(load_model(), demo_folder / "lora")
    layers = adapted_layers(model)
    start = DriftReport.measure(model, statistics).mean_relative_drift
    strengths = []
    for share in (2.0, 0.5, 0.1, 0.01):
        strength, As = strength_for(layers, statistics, share * start)
        factors = [layer.current()._replace(A=A) for layer, A in zip(layers, As, strict=True)]
        drift = statistics.drift_of(layers)(factors).mean().item()
        assert drift <= share * start and (share > 1 or drift > 0.97 * share * start)
        strengths.append(strength)
    assert strengths == sorted(strengths) and strengths[0] == 0.0
    with pytest.raises(ValueError, match="must be above 0"):
        strength_for(layers, statistics, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_report_is_of_the_weights_in_the_file(demo_folder, tmp_path, monkeypatch, capsys, dtype):
    """Rounded to the type of the file they are measured, and kept below the budget."""
    source, target, budget = tmp_path / "lora", tmp_path / "repaired", 1e-4
    shutil.copytree(demo_folder / "lora", source)
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, source / "adapter_model.safetensors")
    arguments = ("project", source, "--base", "miniworld", "--fisher", demo_folder, "--budget", budget)
    code, _, err = command(monkeypatch, capsys, *arguments, "--output-dir", target)
    assert code == 0, err
    assert {tensor.dtype for tensor in load_file(target / "adapter_model.safetensors").values()} == {dtype}
    told = DriftReport.from_pretrained(target)
    loaded = PeftModel.from_pretrained(load_model(), target)
    found = DriftReport.measure(loaded, FisherStatistics.from_pretrained(target))
    torch.testing.assert_close(told.relative_drift, found.relative_drift, rtol=1e-6, atol=0)
    assert 0.97 * budget < found.mean_relative_drift <= budget


def test_budget_below_the_rounding_is_refused(demo_folder):
    """Where X ends with its eigenpairs, the rest of A stays as it is, and rounding moves some of it onto them."""
    statistics = FisherStatistics.from_pretrained(demo_folder)
    statistics.inputs = {n: X._replace(remainder=torch.zeros(())) for n, X in statistics.inputs.items()}
    layers = adapted_layers(PeftModel.from_pretrained(load_model(), demo_folder / "lora"))
    with pytest.raises(ValueError, match="No projection keeps a budget of 1e-12"):
        strength_for(layers, statistics, 1e-12, [torch.bfloat16] * len(layers))


def test_names_that_peft_has_changed_and_tensors_of_the_base_are_no_obstacle(tmp_path, tokenizer, alignment_rows):
    """Of a Llava adapter from before transformers 4.52 the copy has today's names, and the type of its file."""
    options = dict(target_modules=r".*language_model.*q_proj", modules_to_save=["lm_head"])
    source, target = tmp_path / "adapter", tmp_path / "repaired"
    moved_adapter(tiny_vision_language_model(), **options).save_pretrained(source, save_embedding_layers=False)
    new, old = "base_model.model.model.language_model.", "base_model.model.language_model.model."
    path = source / "adapter_model.safetensors"
    save_file({name.replace(new, old): tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    model = load_adapter(tiny_vision_language_model(), source)
    statistics = estimate_fisher(model, alignment_rows, tokenizer, progress=False)
    budget = DriftReport.measure(model, statistics).mean_relative_drift / 10
    assert write_projected(source, target, model, statistics, budget) > 0
    written, head = load_file(target / "adapter_model.safetensors"), "base_model.model.lm_head.weight"
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert {*written} == {name.replace(old, new) for name in load_file(path)}
    assert torch.equal(written[head], load_file(path)[head])
    again = DriftReport.measure(load_adapter(tiny_vision_language_model(), target), statistics)
    assert 0.97 * budget < again.mean_relative_drift <= budget
