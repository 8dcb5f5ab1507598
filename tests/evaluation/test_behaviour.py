"""Answers and likelihoods: batching changes nothing, an adapter that does nothing changes nothing."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from agl_trl.data.alignment import batches, pad_token_id, tokenize_row
from agl_trl.data.rows import prompt_ids
from agl_trl.evaluation.behaviour import measure_behaviour
from agl_trl.evaluation.probes import first_token_kl, probe
from agl_trl.modeling.base_and_tuned import BaseAndTuned
from agl_trl.modeling.generation import answer_logits, answer_nll, generate_answers
from agl_trl.modeling.lora import adapted_layers
from tests.helpers.models import adapted, probe_prompts, tiny_model


@pytest.fixture(scope="module")
def prompts() -> Dataset:
    return probe_prompts()


def test_batching_changes_no_answer_and_no_likelihood(tokenizer, prompts):
    model = tiny_model().eval()
    questions = list(prompts["prompt"])
    answers = [
        generate_answers(model, tokenizer, questions, max_new_tokens=6, batch_size=n, progress=False) for n in (1, 7)
    ]
    assert answers[0] == answers[1]
    one, seven = (answer_nll(model, tokenizer, prompts, batch_size=n) for n in (1, 7))
    torch.testing.assert_close(one, seven, rtol=1e-4, atol=1e-5)


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


def test_logits_are_those_of_the_answers_and_no_others_are_made(tokenizer, prompts):
    model = adapted(0.5).eval()
    rows = [tokenize_row(prompts[i], tokenizer, None) for i in (0, 2, 5)]
    (batch,) = batches(rows, 3, pad_token_id(tokenizer), torch.device("cpu"))
    made = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *args: made.append(args[-1].shape[1]))
    with handle, torch.no_grad():
        logits, mask = answer_logits(model, batch)
        full = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(logits[mask], full[batch.answer_mask])
    assert mask.sum() == batch.answer_mask.sum() and made == [mask.shape[1], batch.input_ids.shape[1]]
    assert made[0] < made[1]


def test_only_logits_that_are_read_are_made(tokenizer, prompts):
    """Likelihood, KL and probes equal the full computation, from a fraction of its columns."""
    model, count, made = adapted(0.5).eval(), len(prompts), []
    questions, unsafe = list(prompts["prompt"]), torch.tensor(prompts["unsafe"])
    rows = [tokenize_row(row, tokenizer, None) for row in prompts]
    (batch,) = batches(rows, count, pad_token_id(tokenizer), torch.device("cpu"))
    with torch.no_grad():
        full = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
    expected = torch.zeros(count)
    for line, index in enumerate(batch.indices):
        positions = batch.answer_mask[line].nonzero().squeeze(1)
        expected[index] = -full[line, positions, batch.input_ids[line, positions + 1]].mean()
    hook = model.get_output_embeddings().register_forward_hook(lambda *args: made.append(args[-1].shape[:2].numel()))
    with hook:
        torch.testing.assert_close(answer_nll(model, tokenizer, prompts), expected, rtol=1e-5, atol=1e-5)
        answers = made.pop()
        assert answers == count * int(batch.answer_mask.any(0).sum()) < 0.8 * batch.input_ids.numel()
        first_token_kl(BaseAndTuned(model), tokenizer, questions, ["yes, that is it"] * count)
        lengths = {len(prompt_ids(tokenizer, question)) for question in questions}
        window = {length - 1 + i for length in lengths for i in range(8)}
        assert made == [count * len(window)] * 2
        made.clear()
        probe(BaseAndTuned(model), tokenizer, questions, unsafe)
        assert made == [count * len(lengths)] * 2


def test_a_model_that_makes_all_logits_gives_the_same(tokenizer, prompts):
    """Of architectures that can't be asked for a few columns, those that are read are taken from all."""

    class AllLogits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = adapted(0.5).eval()
            self.config = self.inner.config

        def forward(self, input_ids, attention_mask, use_cache):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model = AllLogits()
    torch.testing.assert_close(
        answer_nll(model, tokenizer, prompts), answer_nll(model.inner, tokenizer, prompts), rtol=1e-5, atol=1e-5
    )


def test_an_adapter_that_does_nothing_changes_nothing(tokenizer, prompts):
    same = measure_behaviour(adapted(0.0), tokenizer, prompts, max_new_tokens=6, progress=False)
    assert torch.equal(same.refused_base, same.refused_tuned) and torch.equal(same.nll_base, same.nll_tuned)
    assert same.kl_first_tokens.abs().max() == 0
    other = measure_behaviour(adapted(0.5), tokenizer, prompts, max_new_tokens=6, progress=False)
    assert (other.kl_first_tokens > 0).all() and (other.nll_base != other.nll_tuned).all()
    assert other.refusal(True, unsafe=True).total == 4 and other.refusal(True, unsafe=False, category="a").total == 2


def test_kl_equals_brute_force(tokenizer, prompts):
    model = adapted(0.5)
    question, answer = prompts[1]["prompt"], "yes, that is a long answer"
    prompt_ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer_ids = tokenizer(answer)["input_ids"][:8]
    ids = torch.tensor([prompt_ids + answer_ids])
    with torch.no_grad():
        tuned = model(input_ids=ids).logits.double().softmax(-1)
        with model.disable_adapter():
            base = model(input_ids=ids).logits.double().softmax(-1)
    window = slice(len(prompt_ids) - 1, len(prompt_ids) + 7)
    expected = (base * (base / tuned).log()).sum(-1)[0, window].mean()
    value = first_token_kl(BaseAndTuned(model), tokenizer, [question, prompts[0]["prompt"]], [answer, ""])
    assert value[0].item() == pytest.approx(expected.item(), rel=1e-4) and torch.isfinite(value).all()


def test_the_model_is_left_as_it_was(tokenizer, prompts):
    model = adapted(0.1).train()
    measure_behaviour(model, tokenizer, prompts, max_new_tokens=2, progress=False)
    assert all(module.training for module in model.modules())
    assert all(layer.current().B.requires_grad for layer in adapted_layers(model))


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
