"""Training-time methods of the field since, against dense vectors or by hand."""

import torch

from agl_trl.miniworld import load_tokenizer, task_dataset
from examples.benchmark.methods import METHODS, Setting
from examples.benchmark.safegrad import surgery


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
