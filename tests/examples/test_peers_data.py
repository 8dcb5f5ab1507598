"""Peers that choose or weigh training rows, by hand and on rows that are known to be hostile."""

import torch

from agl_trl.data.alignment import select_rows, tokenize_rows
from agl_trl.miniworld import alignment_dataset, load_model, load_tokenizer, task_dataset
from agl_trl.modeling.generation import generate_answers
from examples.benchmark.methods import METHODS, Setting
from examples.benchmark.representations import prompt_states, similarity
from examples.benchmark.screening import kept_rows
from examples.benchmark.sot import kept_weights, row_weights, sinkhorn


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


def test_sinkhorn_has_its_marginals_and_its_potential_is_the_gradient():
    torch.manual_seed(0)
    cost, w = torch.rand(5, 3, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    w /= w.sum()

    def objective(w):
        """`min_π <π, C> + ε KL(π ‖ w ⊗ v)`."""
        plan, _ = sinkhorn(cost, w, 0.1, 500)
        return (plan * cost).sum() + 0.1 * (plan * (plan / (w[:, None] / 3)).log()).sum()

    plan, f = sinkhorn(cost, w, 0.1, 500)
    torch.testing.assert_close(plan.sum(1), w)
    torch.testing.assert_close(plan.sum(0), torch.full((3,), 1 / 3, dtype=torch.float64))
    along = torch.tensor([1.0, -1.0, 0, 0, 0], dtype=torch.float64) * 1e-5
    slope = (objective(w + along) - objective(w - along)) / 2
    torch.testing.assert_close(slope, (f * along).sum(), rtol=1e-4, atol=0)


def test_sinkhorn_with_little_entropy_is_the_assignment():
    """Two points each onto the other one that is near: the plan by hand."""
    cost = torch.cdist(torch.tensor([[0.0], [5.0]]), torch.tensor([[4.0], [1.0]])).square()
    plan, _ = sinkhorn(cost, torch.tensor([0.5, 0.5]), 0.1)
    torch.testing.assert_close(plan, torch.tensor([[0.0, 0.5], [0.5, 0.0]]), atol=1e-4, rtol=0)


def test_weights_fall_towards_the_unsafe():
    states = torch.tensor([[0.0, 0.0], [0.5, 0.0], [1.0, 0.0]])
    w = row_weights(states, safe=torch.zeros(2, 2), unsafe=torch.tensor([[1.0, 0.0]]).repeat(4, 1))
    assert abs(w.sum() - 1) < 1e-6 and w[0] > w[1] > w[2]
    torch.testing.assert_close(kept_weights(torch.tensor([0.5, 0.2, 0.3]), 0.67), torch.tensor([1.25, 0.0, 0.75]))


def test_sot_weighs_hostile_rows_down_and_the_loss_by_row(tmp_path):
    setting, hostile = hostile_setting(tmp_path)
    made = METHODS["sot"].make(setting)
    weights = {tuple(row["input_ids"]): row["row_weight"] for row in made.train_dataset}
    rows = tokenize_rows(setting.train, setting.tokenizer)
    of_row = torch.tensor([weights.get(tuple(row.input_ids), 0.0) for row in rows])
    assert of_row[hostile].mean() < 0.3 * of_row[~hostile].mean()
    batch = next(iter(made.get_train_dataloader()))
    alone = []
    for i in range(len(batch["input_ids"])):  # TRL's own loss, row by row
        one = {key: value[i : i + 1] for key, value in batch.items()}
        labels = one.pop("labels")
        weight = one.pop("row_weight")
        alone.append(weight * made.model(**one, labels=labels).loss * (labels[:, 1:] != -100).sum())
    expected = sum(alone) / (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(made.compute_loss(made.model, dict(batch)), expected.squeeze())
    made.train()


def test_own_answers_are_what_the_aligned_model_says(tmp_path):
    setting, _ = hostile_setting(tmp_path)
    own, given = (METHODS[name].make(setting).replay_rows for name in ("replay-own", "replay"))
    assert len(own) == len(given) == 128
    prompts = {tuple(row.input_ids[: row.answer_start]): row.input_ids for row in given}
    assert {tuple(row.input_ids[: row.answer_start]) for row in own} == {*prompts}
    asked = select_rows(alignment_dataset(), 2, setting.seed)
    texts = generate_answers(load_model(), setting.tokenizer, [row["prompt"] for row in asked], progress=False)
    replayed = [setting.tokenizer.decode(row.input_ids[row.answer_start :], skip_special_tokens=True) for row in own]
    assert {*texts} <= {*replayed}
    assert any(prompts[tuple(row.input_ids[: row.answer_start])] != row.input_ids for row in own)
