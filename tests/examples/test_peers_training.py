"""Peers that act during training, against dense matrices or by hand."""

import pytest
import torch

from agl_trl.miniworld import load_model, load_tokenizer, task_dataset
from agl_trl.modeling.lora import adapted_layers
from examples.benchmark.asft import off_alignment
from examples.benchmark.lookahead import PREFIX, real, virtual
from examples.benchmark.methods import METHODS, Setting
from examples.benchmark.projection import ogpsa, spf


def trainer(name, tmp_path, steps=3):
    made = METHODS[name].make(Setting(tmp_path, 0, steps, load_tokenizer(), task_dataset("steps").select(range(64))))
    made.train()
    return made


def test_asft_is_the_dense_penalty_with_its_gradient():
    torch.manual_seed(0)
    A, B, V = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 7), (5, 3), (5, 7)))
    A.requires_grad_(), B.requires_grad_()
    C = V @ V.T / V.norm()
    dense = ((torch.eye(5, dtype=torch.float64) - C) @ B @ A).square().sum()
    ours = off_alignment(A, B, V)
    torch.testing.assert_close(ours, dense)
    torch.testing.assert_close(torch.autograd.grad(ours, (A, B)), torch.autograd.grad(dense, (A, B)))


def test_asft_takes_the_direction_from_base_to_aligned(tmp_path):
    made = trainer("asft", tmp_path)
    base, aligned = load_model("base"), load_model()
    name = next(layer.name for layer in adapted_layers(made.model))
    expected = aligned.get_submodule(name).weight - base.get_submodule(name).weight
    torch.testing.assert_close(made.directions[name], expected.detach())
    plain = trainer("lora", tmp_path / "plain")

    def penalty(model) -> torch.Tensor:
        return sum(off_alignment(*layer.parameters(), made.directions[layer.name]) for layer in adapted_layers(model))

    assert penalty(made.model) < penalty(plain.model)


def test_spf_takes_the_leading_direction_of_a_conflict_out_and_leaves_the_rest():
    torch.manual_seed(0)
    safety, gradient = torch.randn(6, 4), torch.randn(6, 4)
    gradient -= safety * ((gradient * safety).sum() / safety.square().sum() + 0.1)  # conflicts
    U = torch.linalg.svd(safety).U[:, :2]
    got = spf(gradient, safety, k=2)
    torch.testing.assert_close(got, (torch.eye(6) - U @ U.T) @ gradient)
    assert (U.T @ got).abs().max() < 1e-5
    assert spf(-gradient, safety, k=2) is not None and torch.equal(spf(-gradient, safety, k=2), -gradient)


@pytest.mark.parametrize("sign", [1, -1])
def test_ogpsa_is_orthogonal_to_both_references_whatever_the_sign(sign):
    torch.manual_seed(0)
    first, second, gradient = (torch.randn(6, 4, dtype=torch.float64) for _ in range(3))
    got = ogpsa(sign * gradient, first, second)
    basis = torch.linalg.qr(torch.stack([first.flatten(), second.flatten()], 1)).Q
    dense = sign * gradient.flatten() - basis @ (basis.T @ (sign * gradient.flatten()))
    torch.testing.assert_close(got.flatten(), dense)
    torch.testing.assert_close(ogpsa(gradient, torch.zeros_like(first)), gradient)


@pytest.mark.parametrize("name", ["spf", "ogpsa"])
def test_projection_changes_the_run(name, tmp_path):
    plain, ours = trainer("lora", tmp_path / "plain"), trainer(name, tmp_path)
    pairs = zip(plain.model.parameters(), ours.model.parameters(), strict=True)
    assert any(not torch.equal(p, q) for p, q in pairs)


def test_lookahead_rows_are_these_strings():
    row = {
        "prompt": [{"role": "user", "content": "Add 1 and 2."}],
        "completion": [{"role": "assistant", "content": "12345678 is it."}],
    }
    shown = real(row, load_tokenizer())  # digits are a token each
    assert shown["prompt"][0]["content"] == "Add 1 and 2. The answer begins with: 123456"
    assert shown["completion"] == row["completion"]
    assert real(row, load_tokenizer(), tokens=2)["prompt"][0]["content"].endswith("begins with: 12")
    shown = virtual(row)
    assert shown["prompt"][0]["content"] == f"Add 1 and 2. The answer begins with: {PREFIX}"
    assert shown["completion"][0]["content"] == "Let's solve this problem. 12345678 is it."
    assert row["prompt"][0]["content"] == "Add 1 and 2.", "the row itself stays"


def test_lookahead_trains_on_its_rows(tmp_path):
    made = trainer("lookahead-virtual", tmp_path)
    text = load_tokenizer().decode(made.train_dataset[0]["input_ids"])
    assert text.count("Let's solve this problem.") == 2


@pytest.mark.parametrize(
    ("name", "every", "left"),
    [("spf", 10, 3), ("spf-2", 10, 2), ("spf-4", 10, 0), ("ogpsa", 30, 4), ("ogpsa-5", 5, 4)],
)
def test_strengths_of_projection(name, every, left, tmp_path):
    """The rank that a conflicting gradient of rank four has left, and the steps between two looks at the references."""
    setting = Setting(tmp_path, 0, 3, load_tokenizer(), task_dataset("steps").select(range(16)))
    callback = METHODS[name].make(setting).callback_handler.callbacks[-1]
    torch.manual_seed(0)
    gradient = torch.randn(6, 4, dtype=torch.float64)
    got = callback.project(gradient, -gradient if name.startswith("spf") else torch.randn(6, 4, dtype=torch.float64))
    assert callback.every == every and torch.linalg.matrix_rank(got, atol=1e-9) == left
