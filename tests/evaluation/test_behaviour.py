"""Base and tuned model side by side: an adapter that does nothing changes nothing, and rates and tests by hand."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scipy.stats import binomtest

from agl_trl.evaluation.answer_cache import AnswerCache
from agl_trl.evaluation.behaviour import measure_behaviour
from agl_trl.evaluation.rates import Rate
from agl_trl.modeling.lora import adapted_layers
from tests.helpers.models import adapted, probe_prompts, tiny_model
from tests.helpers.reports import behaviour_by_hand


@pytest.fixture(scope="module")
def prompts() -> Dataset:
    return probe_prompts()


def test_an_adapter_that_does_nothing_changes_nothing(tokenizer, prompts):
    same = measure_behaviour(adapted(0.0), tokenizer, prompts, max_new_tokens=6, progress=False)
    assert torch.equal(same.refused_base, same.refused_tuned) and torch.equal(same.nll_base, same.nll_tuned)
    assert same.kl_first_tokens.abs().max() == 0
    other = measure_behaviour(adapted(0.5), tokenizer, prompts, max_new_tokens=6, progress=False)
    assert (other.kl_first_tokens > 0).all() and (other.nll_base != other.nll_tuned).all()
    assert other.refusal(True, unsafe=True).total == 4 and other.refusal(True, unsafe=False, category="a").total == 2


def test_the_model_is_left_as_it_was(tokenizer, prompts):
    model = adapted(0.1).train()
    measure_behaviour(model, tokenizer, prompts, max_new_tokens=2, progress=False)
    assert all(module.training for module in model.modules())
    assert all(layer.current().B.requires_grad for layer in adapted_layers(model))


def test_answers_are_one_json_object_per_prompt(tokenizer, prompts):
    answers = measure_behaviour(adapted(0.1), tokenizer, prompts, max_new_tokens=2, progress=False)
    assert len(answers.answers) == len(prompts) and json.loads(json.dumps(answers.answers[0])) == answers.answers[0]
    assert {entry["expected"] for entry in answers.answers} == {"refuse", "comply"}
    assert answers.answers[0]["judge"].startswith("refusal-strings")


def test_rates_and_their_wilson_interval_by_hand():
    behaviour = behaviour_by_hand()
    assert behaviour.refusal(tuned=False) == Rate(4, 4) and behaviour.refusal(tuned=True) == Rate(1, 4)
    assert behaviour.refusal(tuned=True, unsafe=False) == Rate(1, 3)
    assert behaviour.refusal(tuned=True, category="fraud") == Rate(0, 3)
    assert behaviour.mean_kl(unsafe=True) == pytest.approx(0.25) and behaviour.mean_kl(unsafe=False) == pytest.approx(
        0.1
    )
    z, n, p = 1.959964, 40, 10 / 40
    centre, width = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    expected = [(centre - width) / (1 + z * z / n), (centre + width) / (1 + z * z / n)]
    assert list(Rate(10, 40).interval) == pytest.approx(expected, rel=1e-5)


def test_paired_test_is_of_the_prompts_on_which_the_models_differ():
    behaviour = behaviour_by_hand()
    assert behaviour.paired_p_value() == pytest.approx(2 * 0.5**3), "three lost, none won"
    assert behaviour.paired_p_value(unsafe=False) == 1.0
    behaviour.refused_tuned = torch.tensor([False, False, False, True, True, True, False])
    assert behaviour.paired_p_value(unsafe=False) == pytest.approx(binomtest(0, 2).pvalue) == 0.5
    behaviour.refused_tuned = behaviour.refused_base.clone()
    assert behaviour.paired_p_value() == 1.0, "no difference"


@pytest.mark.parametrize("prompts", [Dataset.from_list([{"text": "a"}]), Dataset.from_dict({"prompt": []})])
def test_prompts_that_are_none_are_told(prompts, tokenizer):
    with pytest.raises(ValueError, match=r"Prompts need a column 'prompt' and at least one row; found \["):
        measure_behaviour(adapted(0.0), tokenizer, prompts, progress=False)


@pytest.mark.parametrize(
    "prompt, sentence",
    [
        (
            [{"role": "user", "content": "x" * 200}],
            "Row 1 has a prompt of 203 tokens, and the model reads 128: shorten it.",
        ),
        (None, "Row 1 has nothing in the column 'prompt'."),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_named_before_any_is_answered(tokenizer, prompt, sentence):
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "hi"}], prompt]})
    model = get_peft_model(tiny_model("gpt2"), LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(ValueError) as raised:
        measure_behaviour(model, tokenizer, rows, progress=False)
    assert str(raised.value) == sentence


def test_a_reference_answer_that_does_not_fit_is_named_before_any_is_answered(tokenizer, tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": text}]}
        for text in ("yes", "y" * 130)
    ]
    model = get_peft_model(tiny_model("gpt2"), LoraConfig(target_modules=["c_attn"]))
    store = AnswerCache(tmp_path / "answers.jsonl", "")
    with pytest.raises(
        ValueError, match=r"Row 1 has 136 tokens, and the model reads 128: shorten or remove the row\."
    ):
        measure_behaviour(model, tokenizer, Dataset.from_list(rows), store=store, progress=False)
    assert not store.answers and not store.path.exists()


@pytest.mark.parametrize(("question", "answer"), [(1100, 20), (900, 300)])
def test_reference_answers_are_read_whole_as_far_as_the_model_reads(question, answer, tokenizer):
    row = {
        "prompt": [{"role": "user", "content": "ask " * (question // 4)}],
        "completion": [{"role": "assistant", "content": "say " * (answer // 4)}],
    }
    model = adapted(0.5)
    found = measure_behaviour(model, tokenizer, Dataset.from_list([row]), max_new_tokens=1, progress=False)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
    asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = torch.tensor([whole])
    labels = ids.clone()
    labels[0, : len(asked)] = -100
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels).loss.item()
    assert len(whole) > 1024 and found.nll_tuned.tolist() == pytest.approx([expected], rel=1e-5)
