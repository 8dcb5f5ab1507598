"""Training-time methods of the field since, against dense vectors or by hand."""

import torch

from agl_trl.data.alignment import tokenize_rows
from agl_trl.miniworld import alignment_dataset, load_model, load_tokenizer, task_dataset
from agl_trl.modeling.lora import adapted_layers
from examples.benchmark.methods import METHODS, Setting
from examples.benchmark.safegrad import surgery
from examples.benchmark.ssah import critical, importance


def trainer(name, tmp_path, steps=3):
    made = METHODS[name].make(Setting(tmp_path, 0, steps, load_tokenizer(), task_dataset("steps").select(range(64))))
    made.train()
    return made


def flat(parts) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def differ(first, second) -> bool:
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    return any(not torch.equal(p, q) for p, q in pairs)


def test_safegrad_projects_a_conflict_of_the_whole_vector_out():
    torch.manual_seed(0)
    alignment = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    # The first tensor alone agrees, the whole conflicts: what counts is the whole.
    gradient = [0.1 * alignment[0], -3 * alignment[1] + torch.randn(5, dtype=torch.float64)]
    g, a = flat(gradient), flat(alignment)
    assert g @ a < 0 < (gradient[0] * alignment[0]).sum()
    got = surgery(gradient, alignment)
    torch.testing.assert_close(flat(got), g - a * (g @ a) / (a @ a))
    assert abs(flat(got) @ a) < 1e-12
    torch.testing.assert_close(flat(surgery(gradient, alignment, coef=0.5)), flat(got) + 0.5 * a)


def test_safegrad_leaves_what_agrees():
    torch.manual_seed(0)
    a = [torch.randn(3, 4)]
    assert torch.equal(surgery([2 * a[0]], a)[0], 2 * a[0])
    assert torch.equal(surgery(a, [torch.zeros(3, 4)])[0], a[0]), "at the first step the alignment's is zero"


def test_safegrad_changes_the_run(tmp_path):
    plain, ours, added = (trainer(name, tmp_path / name, steps=4) for name in ("lora", "safegrad", "safegrad-1"))
    assert differ(plain, ours) and differ(ours, added)


def test_ssah_freezes_what_safety_needs_and_utility_does_not():
    safety, utility = torch.tensor([5.0, 4.0, 3.0, 1.0]), torch.tensor([5.0, 1.0, 1.0, 1.0])
    assert critical(safety, utility, 0.25).tolist() == [False, True, False, False], (
        "not the largest, the most of its own"
    )
    assert critical(safety, utility, 0.5).tolist() == [False, True, True, False]


def test_ssah_importance_is_the_rms_of_the_output_where_answers_are_predicted():
    model, tokenizer = load_model(), load_tokenizer()
    (row,) = tokenize_rows(alignment_dataset().select([0]), tokenizer)
    name = "model.layers.1.mlp.gate_proj"
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    with torch.no_grad():
        model(torch.tensor([row.input_ids]))
    handle.remove()
    expected = seen[0][row.answer_start - 1 : -1].square().mean(0).sqrt()
    torch.testing.assert_close(importance(model, [row], tokenizer.pad_token_id)[name], expected)


def test_ssah_leaves_the_share_of_rows_at_zero(tmp_path):
    for layer in adapted_layers(trainer("ssah-0.3", tmp_path).model):
        _, B = layer.parameters()
        still = (B == 0).all(1).sum().item()
        assert still == round(0.3 * len(B)), layer.name
