"""Likelihoods: those of the model's own loss."""

import pytest
import torch
from datasets import Dataset

from agl_trl.modeling.likelihood import answer_nll
from tests.helpers.models import probe_prompts, tiny_model


@pytest.fixture(scope="module")
def prompts() -> Dataset:
    return probe_prompts()


def test_likelihood_equals_the_models_own_loss(tokenizer, prompts):
    model = tiny_model().eval()
    row = prompts[2]
    start = len(
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    )
    ids = torch.tensor(
        [tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]]
    )
    labels = ids.clone()
    labels[0, :start] = -100
    expected = model(input_ids=ids, labels=labels).loss.item()
    assert answer_nll(model, tokenizer, [row])[0].item() == pytest.approx(expected, rel=1e-5)
