"""LAPT's perturbation, against the gradient of the states themselves."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from agl_trl.data.alignment import batches
from agl_trl.experiments.demo import LORA
from agl_trl.miniworld import load_model, load_tokenizer, task_dataset
from examples.benchmark.lapt import layer_input, perturbation
from examples.benchmark.methods import METHODS, Setting
from examples.benchmark.setting import batch_nll, protected_rows


@pytest.mark.parametrize("number", [0, 2])
def test_the_perturbation_is_the_step_that_hurts_most(number):
    tokenizer = load_tokenizer()
    model = get_peft_model(load_model(), LoraConfig(**LORA)).eval()
    rows, _ = protected_rows(tokenizer, 0)
    (batch,) = batches(rows[:3], 3, tokenizer.pad_token_id, model.device)
    layer = model.get_base_model().model.layers[number]
    nll, delta = perturbation(model, layer, batch, 0.01)
    plain = batch_nll(model, batch)
    torch.testing.assert_close(nll, plain)
    nll.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    with torch.no_grad():
        states = model(batch.input_ids, batch.attention_mask, output_hidden_states=True).hidden_states[number]
        rms = states[batch.attention_mask.bool()].square().mean().sqrt()
        real = batch.attention_mask.bool()
        assert (delta[~real] == 0).all() and (~real).any()
        torch.testing.assert_close(delta[real].abs().max(), 0.01 * rms)

        def moved(change):
            with layer_input(layer, lambda states: states + change):
                return batch_nll(model, batch)

        noise = delta.abs() * torch.randn_like(delta).sign()
        assert moved(delta) > moved(noise) and moved(delta) > plain > moved(-delta)
        # Finite differences: the step goes along the gradient, entry by entry.
        where = (0, int(batch.answer_mask[0].nonzero()[0]), 5)
        probe = torch.zeros_like(delta)
        probe[where] = 0.02 * rms
        slope = moved(probe) - moved(-probe)
        assert slope.sign() == delta[where].sign()


def test_lapt_goes_through_all_layers_and_trains(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "examples.benchmark.lapt.perturbation", lambda *args: seen.append(args[1]) or perturbation(*args)
    )
    setting = Setting(tmp_path, 0, 5, load_tokenizer(), task_dataset("steps").select(range(64)))
    made = METHODS["lapt"].make(setting)
    made.train()
    layers = list(made.model.get_base_model().model.layers)
    assert [layers.index(layer) for layer in seen] == [0, 1, 2, 3, 0]
    assert not layers[0]._forward_pre_hooks
    plain = METHODS["replay"].make(setting)
    plain.train()
    pairs = zip(plain.model.parameters(), made.model.parameters(), strict=True)
    assert any(not torch.equal(p, q) for p, q in pairs)
