"""Probes against their formulas by hand."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from agl_trl.data.rows import prompt_ids
from agl_trl.evaluation.behaviour import measure_behaviour
from agl_trl.evaluation.probes import COMPLIANCE_OPENERS, REFUSAL_OPENERS, opener_ids, probe
from agl_trl.miniworld import heldout_safe, heldout_unsafe, load_model, load_tokenizer
from agl_trl.modeling.base_and_tuned import BaseAndTuned
from agl_trl.modeling.lora import adapted_layers, at_reference
from tests.helpers.models import adapted, probe_prompts, tiny_model


@pytest.fixture(scope="module")
def prompts() -> Dataset:
    return probe_prompts()


def test_probes_equal_one_prompt_at_a_time(prompts):
    """On the embedded world, whose tokenizer tells the openers apart: margin, hidden drift, direction by their formulas."""
    tokenizer = load_tokenizer()
    model = get_peft_model(load_model(), LoraConfig(r=4, target_modules="all-linear")).eval()
    torch.manual_seed(1)
    for layer in adapted_layers(model):
        torch.nn.init.normal_(layer.parameters()[1], std=0.03)
    questions = [*heldout_unsafe()["prompt"][:5], *heldout_safe()["prompt"][:4]]
    unsafe = torch.tensor([True] * 5 + [False] * 4)
    refusal, compliance = opener_ids(tokenizer)
    assert len(refusal) <= len(REFUSAL_OPENERS) and len(compliance) <= len(COMPLIANCE_OPENERS)
    margins, states = [[], []], [[], []]
    for question in questions:
        ids = torch.tensor([prompt_ids(tokenizer, question)])
        for side in (0, 1):
            with torch.no_grad(), at_reference(model, adapted_layers(model)) if side == 0 else torch.no_grad():
                output = model(input_ids=ids, output_hidden_states=True)
            p = output.logits[0, -1].double().softmax(-1)
            margins[side].append((p[refusal].sum().log() - p[compliance].sum().log()).item())
            states[side].append(torch.stack([h[0, -1] for h in output.hidden_states]).double())
    # What the answers are, and how many tokens they have, is nothing to what stands before them.
    answers = [" ".join(["yes"] * number) for number in range(len(questions))]
    probes = probe(BaseAndTuned(model), tokenizer, questions, answers, unsafe, batch_size=4)
    assert probes.margin_base.tolist() == pytest.approx(margins[0], rel=1e-3, abs=1e-3)
    assert probes.margin_tuned.tolist() == pytest.approx(margins[1], rel=1e-3, abs=1e-3)
    base, tuned = (torch.stack(side) for side in states)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(
        probes.hidden_drift.double(), (1 - cosine(base, tuned, dim=-1)).mean(0), rtol=1e-3, atol=1e-5
    )
    directions = [side[unsafe].mean(0) - side[~unsafe].mean(0) for side in (base, tuned)]
    torch.testing.assert_close(probes.direction_cosine.double(), cosine(*directions, dim=-1), rtol=1e-3, atol=1e-4)
    assert probes.margin_base[unsafe].mean() > 2 and probes.margin_base[~unsafe].mean() < -2, "it refuses and it helps"


def test_openers_that_share_a_token_give_no_margin(tokenizer, prompts):
    """A byte tokenizer can't tell 'Sorry' from 'Sure' by the first token: NaN, not a number that means nothing."""
    assert opener_ids(tokenizer) is None
    questions, unsafe = list(prompts["prompt"]), torch.tensor(prompts["unsafe"])
    probes = probe(BaseAndTuned(adapted(0.1)), tokenizer, questions, ["yes"] * len(questions), unsafe)
    assert probes.margin_base.isnan().all() and (probes.hidden_drift[1:] > 0).all() and probes.hidden_drift[0] == 0


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
    asked, unsafe = [question, prompts[0]["prompt"]], torch.tensor([True, False])
    value = probe(BaseAndTuned(model), tokenizer, asked, [answer, ""], unsafe).kl_first_tokens
    assert value[0].item() == pytest.approx(expected.item(), rel=1e-4) and torch.isfinite(value).all()


def test_layers_of_different_sizes_are_probed_each_by_itself(tokenizer, prompts):
    base, tuned = tiny_model("opt").eval(), tiny_model("opt", seed=1).eval()
    questions, unsafe = list(prompts["prompt"]), torch.tensor(prompts["unsafe"])
    probes = probe(BaseAndTuned(tuned, base), tokenizer, questions, ["yes"] * len(questions), unsafe, batch_size=3)
    states: list[list] = [[], []]
    for side, model in zip(states, (base, tuned), strict=True):
        for question in questions:
            with torch.no_grad():
                hidden = model(torch.tensor([prompt_ids(tokenizer, question)]), output_hidden_states=True)
            side.append([h[0, -1] for h in hidden.hidden_states])
    sizes = [len(h) for h in states[0][0]]
    assert len({*sizes}) == 2, "this model has layers of two sizes"
    for layer in range(len(sizes)):
        one, other = (torch.stack([h[layer] for h in side]) for side in states)
        cosine = torch.nn.functional.cosine_similarity
        assert probes.hidden_drift[layer].item() == pytest.approx((1 - cosine(one, other)).mean().item(), rel=1e-3)
        directions = [side[unsafe].mean(0) - side[~unsafe].mean(0) for side in (one, other)]
        expected = cosine(*directions, dim=0).item()
        assert probes.direction_cosine[layer].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("size", [264, 300])
def test_a_resized_vocabulary_is_compared_where_both_have_words(size, tokenizer, prompts):
    """New tokens, which no answer of the base has, take nothing from what is compared; and none are made up."""
    base, tuned = tiny_model().eval(), tiny_model().eval()
    tuned.resize_token_embeddings(size, mean_resizing=False)
    same = measure_behaviour(tuned, tokenizer, prompts, base=base, max_new_tokens=4, progress=False)
    assert same.kl_first_tokens.abs().max() < 1e-6 and same.hidden_drift.max() < 1e-6
    other = tiny_model(seed=1).eval()
    whole = measure_behaviour(other, tokenizer, prompts, base=base, max_new_tokens=4, progress=False)
    other.resize_token_embeddings(size, mean_resizing=False)
    resized = measure_behaviour(other, tokenizer, prompts, base=base, max_new_tokens=4, progress=False)
    assert whole.kl_first_tokens.min() > 1e-3
    torch.testing.assert_close(resized.kl_first_tokens, whole.kl_first_tokens, rtol=1e-4, atol=1e-5)


def test_a_vocabulary_that_lost_tokens_is_told_before_anything_is_asked(tokenizer, prompts):
    base, tuned, asked = tiny_model().eval(), tiny_model().eval(), []
    tuned.resize_token_embeddings(200)
    for model in (base, tuned):
        model.register_forward_pre_hook(lambda *args: asked.append(1))
    with pytest.raises(ValueError, match="knows 200 tokens, the base model 260, and its tokenizer makes 260"):
        measure_behaviour(tuned, tokenizer, prompts, base=base, max_new_tokens=4, progress=False)
    assert not asked
