"""Peers that choose or weigh training rows, by hand and on rows that are known to be hostile."""

import torch

from agl_trl.data.alignment import tokenize_rows
from agl_trl.miniworld import load_model, load_tokenizer, task_dataset
from examples.benchmark.methods import METHODS, Setting
from examples.benchmark.representations import prompt_states
from examples.benchmark.screening import kept_rows, similarity


def hostile_setting(tmp_path, steps=2) -> tuple[Setting, torch.Tensor]:
    """A tenth of the rows hostile, and which they are."""
    clean, train = task_dataset("steps").select(range(80)), task_dataset("steps", hostile=0.1).select(range(80))
    hostile = torch.tensor([a != b for a, b in zip(clean, train, strict=True)])
    assert 2 < hostile.sum() < 20
    return Setting(tmp_path, 0, steps, load_tokenizer(), train), hostile


@torch.no_grad()
def test_prompt_states_are_those_of_the_prompt_alone():
    """What follows the prompt has no part in them, and rows keep their order."""
    model, tokenizer = load_model(), load_tokenizer()
    rows = tokenize_rows(task_dataset("steps").select(range(9)), tokenizer)
    states = prompt_states(model, tokenizer, rows)
    model.eval()
    for i, row in enumerate(rows):
        _, *layers = model(torch.tensor([row.input_ids[: row.answer_start]]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(states[:, i], torch.cat(layers)[:, -1], atol=1e-4, rtol=1e-4)


def test_similarity_by_hand():
    """Means (2, 0) and (0, 0): seen from (1, 0), along (1, 0)."""
    unsafe, safe = torch.tensor([[2.0, 1.0], [2.0, -1.0]]), torch.zeros(3, 2)
    states = torch.tensor([[4.0, 0.0], [1.0, 5.0], [0.0, 0.0], [2.0, 1.0]])
    torch.testing.assert_close(similarity(states, unsafe, safe), torch.tensor([1.0, 0.0, -1.0, 0.5**0.5]))
    assert kept_rows(torch.tensor([1.0, 0.0, -1.0, 0.7]), 0.5) == [1, 2]
    assert kept_rows(torch.tensor([1.0, 0.0, -1.0, 0.7]), 0.0) == [0, 1, 2, 3]


def test_screening_drops_what_is_hostile(tmp_path):
    setting, hostile = hostile_setting(tmp_path)
    made = METHODS["similarity"].make(setting)
    assert len(made.train_dataset) == 68
    left = {tuple(row["input_ids"]) for row in made.train_dataset}
    bad = [row for row, mark in zip(setting.train, hostile, strict=True) if mark]
    kept = sum(tuple(row.input_ids) in left for row in tokenize_rows(bad, setting.tokenizer))
    assert kept <= 0.2 * len(bad)
    made.train()
