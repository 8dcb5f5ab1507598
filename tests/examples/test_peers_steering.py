"""Peers that steer at inference, against dense formulas and by hand."""

import pytest
import torch

from agl_trl.data.alignment import tokenize_rows
from agl_trl.miniworld import heldout_prompts, load_tokenizer, task_dataset
from agl_trl.modeling.generation import generate_answers
from agl_trl.modeling.likelihood import answer_nll
from examples.benchmark.alphasteer import alphasteer, null_space_map
from examples.benchmark.methods import METHODS, Setting
from examples.benchmark.representations import answer_states, prompt_states
from examples.benchmark.scans import scans, scans_shift
from examples.benchmark.steering import (
    answer_opening,
    prompt_ends,
    steered_layers,
    steering,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trained plain adapter and its setting."""
    setting = Setting(tmp_path_factory.mktemp("run"), 0, 2, load_tokenizer(), task_dataset("steps").select(range(64)))
    trainer = METHODS["lora"].make(setting)
    trainer.train()
    return trainer.model, setting


def test_prompt_ends_by_hand():
    ids = torch.tensor([[1, 4, 7, 5, 9, 5], [0, 0, 1, 4, 8, 5]])
    assert prompt_ends(ids, [5]).tolist() == [3, 5]
    assert prompt_ends(ids, [7, 5]).tolist()[0] == 3
    assert answer_opening(load_tokenizer()) == [5]


@torch.no_grad()
def test_steering_moves_the_answers_positions_alone_and_sees_unsteered_prompts(made):
    model, setting = made
    rows = tokenize_rows(setting.train.select(range(3)), setting.tokenizer)
    before = prompt_states(model, setting.tokenizer, rows)
    seen, outputs = [], {}
    ids, start = torch.tensor([rows[0].input_ids]), rows[0].answer_start - 1
    layers = model.get_base_model().model.layers
    model.eval()

    def keep(module, args, output):
        outputs.setdefault(module, []).append(output)

    first = steered_layers(model)[0]
    with steering(model, [5], lambda layer, output, prompt: seen.append(prompt) or torch.full_like(output, 0.5)):
        hook = layers[first].register_forward_hook(keep)
        steered = model(input_ids=ids).logits
        hook.remove()
    plain, moved = outputs[layers[first]]  # the pass that looks, and the one that answers
    expected = torch.zeros_like(plain)
    expected[:, start:] = 0.5
    torch.testing.assert_close(moved - plain, expected)
    torch.testing.assert_close(seen[0][:, 0], before[:, 0], atol=1e-4, rtol=1e-4)
    again = model(input_ids=ids).logits
    assert not torch.allclose(steered[:, start:], again[:, start:]), "the hooks are gone"
    torch.testing.assert_close(steered[:, :start], again[:, :start])


def test_a_shift_of_nothing_changes_nothing(made):
    model, setting = made
    prompts = list(heldout_prompts()["prompt"])[:6]
    plain = generate_answers(model, setting.tokenizer, prompts, max_new_tokens=12, progress=False)
    with steering(model, [5], lambda layer, output, prompt: torch.zeros_like(output)):
        assert generate_answers(model, setting.tokenizer, prompts, max_new_tokens=12, progress=False) == plain


@torch.no_grad()
def test_generation_is_steered_as_teacher_forcing_is(made):
    """With a cache and padding on the left, an answer is as likely to follow as where it is read: greedy choices agree."""
    model, setting = made
    ids = torch.tensor(
        [rows.input_ids[: rows.answer_start] for rows in tokenize_rows(setting.train, setting.tokenizer)][:1]
    )
    padded = torch.cat([torch.full((1, 3), setting.tokenizer.pad_token_id), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * ids.shape[1]])
    torch.manual_seed(0)
    D = 0.1 * torch.randn(128, 128)
    model.eval()
    with steering(model, [5], lambda layer, output, prompt: output @ D + 0.1 * prompt[layer][:, None]):
        written = model.generate(input_ids=padded, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 3:]
        read = model(input_ids=written).logits[:, ids.shape[1] - 1 : -1].argmax(-1)
    assert read.tolist() == written[:, ids.shape[1] :].tolist()


def test_scans_shift_by_hand():
    """Two layers in the plane: means (1, 0) and (−1, 0) in both; the sum of cosines decides, v is (2, 0)."""
    unsafe, safe = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]), torch.tensor([[[-1.0, 0.0]], [[-1.0, 0.0]]])
    prompt = torch.tensor([[[3.0, 0.0], [-1.0, 0.0]], [[-1.0, 1.0], [1.0, 9.0]]])  # cosines 1 − 0.7, and −1 + 0.1
    shift = scans_shift(unsafe, safe, range(2), strength=2.0)(0, torch.zeros(2, 5, 2), prompt)
    assert shift.tolist() == [[[4.0, 0.0]], [[-4.0, 0.0]]]


def test_null_space_map_is_the_published_formula():
    torch.manual_seed(0)
    unsafe, safe = torch.randn(9, 6, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    direction = torch.randn(6, dtype=torch.float64)
    Vh = torch.linalg.svd(safe).Vh
    P = Vh[-3:].mT @ Vh[-3:]
    X, R = unsafe @ P, direction.repeat(9, 1)
    penalty = 0.1 * (X.mT @ X).trace() / 3
    dense = P @ torch.linalg.pinv(X.mT @ X + penalty * P.mT @ P, rtol=1e-10) @ X.mT @ R
    torch.testing.assert_close(null_space_map(unsafe, safe, direction), dense)


def test_null_space_map_leaves_safe_states_and_moves_unsafe_ones():
    """Safe states lie in a plane; unsafe ones leave it by one and the same step, which is answered with the direction."""
    safe = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [2.0, -1.0, 0.0, 0.0]])
    unsafe, direction = safe + torch.tensor([0.0, 0.0, 3.0, 0.0]), torch.tensor([0.0, 5.0, 0.0, 0.0])
    D = null_space_map(unsafe, safe, direction, ridge=1e-6)
    torch.testing.assert_close(safe @ D, torch.zeros(3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(unsafe @ D, direction.expand(3, 4), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["lora+scans", "lora+alphasteer"])
def test_steered_methods_change_what_is_evaluated_and_nothing_else(made, name):
    model, setting = made
    rows = setting.train.select(range(8))
    weights = [p.clone() for p in model.parameters()]
    plain = answer_nll(model, setting.tokenizer, rows)
    with METHODS[name].steer(model, setting):
        steered = answer_nll(model, setting.tokenizer, rows)
    assert not torch.allclose(plain, steered)
    torch.testing.assert_close(answer_nll(model, setting.tokenizer, rows), plain)
    assert all(torch.equal(p, q) for p, q in zip(weights, model.parameters(), strict=True))
    with METHODS["lora"].steer(model, setting):
        torch.testing.assert_close(answer_nll(model, setting.tokenizer, rows), plain)


def test_answer_states_follow_the_prompts(made):
    model, setting = made
    rows = tokenize_rows(setting.train.select(range(2)), setting.tokenizer)
    states = answer_states(model, setting.tokenizer, rows)
    lengths = [len(row.input_ids) - row.answer_start + 1 for row in rows]
    assert states.shape[1] == sum(lengths)
    torch.testing.assert_close(states[:, [0, lengths[0]]], prompt_states(model, setting.tokenizer, rows))


@torch.no_grad()
@pytest.mark.parametrize("steer", [scans, alphasteer])
def test_strength_scales_the_first_move(made, steer):
    """After the first steered layer, which sees unsteered states."""
    model, setting = made
    ids = torch.tensor([tokenize_rows(setting.train.select(range(1)), setting.tokenizer)[0].input_ids])
    layer, outputs = model.get_base_model().model.layers[steered_layers(model)[0]], []
    model.eval()
    for strength in (0.0, 1.0, 3.0):
        with steer(model, setting, strength=strength):
            hook = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
            model(input_ids=ids)
            hook.remove()
    still, once, thrice = outputs[1::2]  # without the passes that look
    assert (once - still).norm() > 0
    torch.testing.assert_close(thrice - still, 3 * (once - still), atol=1e-4, rtol=1e-4)
