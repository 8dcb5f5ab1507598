"""Probes against the formulas by hand, two checkpoints against an adapter, the store, and conditions on a report."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from agl_trl import DriftReport, estimate_fisher
from agl_trl.drift.thresholds import Condition, figures
from agl_trl.evaluation.answer_cache import AnswerCache
from agl_trl.evaluation.behaviour import measure_behaviour
from agl_trl.evaluation.probes import COMPLIANCE_OPENERS, REFUSAL_OPENERS, opener_ids, probe
from agl_trl.miniworld import heldout_safe, heldout_unsafe, load_model, load_tokenizer
from agl_trl.modeling.base_and_tuned import BaseAndTuned
from agl_trl.modeling.generation import prompt_ids
from agl_trl.modeling.lora import adapted_layers, at_reference
from tests.helpers import reference
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
    probes = probe(BaseAndTuned(model), tokenizer, questions, unsafe, batch_size=4)
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
    probes = probe(BaseAndTuned(adapted(0.1)), tokenizer, list(prompts["prompt"]), torch.tensor(prompts["unsafe"]))
    assert probes.margin_base.isnan().all() and (probes.hidden_drift[1:] > 0).all() and probes.hidden_drift[0] == 0


def test_layers_of_different_sizes_are_probed_each_by_itself(tokenizer, prompts):
    base, tuned = tiny_model("opt").eval(), tiny_model("opt", seed=1).eval()
    questions, unsafe = list(prompts["prompt"]), torch.tensor(prompts["unsafe"])
    probes = probe(BaseAndTuned(tuned, base), tokenizer, questions, unsafe, batch_size=3)
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


def test_merged_checkpoint_is_measured_as_its_adapter(tokenizer, prompts, alignment_rows):
    model = adapted(0.2)
    statistics = estimate_fisher(tiny_model(), alignment_rows, tokenizer, progress=False)
    by_adapter = DriftReport.measure(model, statistics)
    answers = measure_behaviour(model, tokenizer, prompts, max_new_tokens=5, progress=False)
    merged = model.merge_and_unload()
    by_checkpoint = DriftReport.measure_checkpoint(tiny_model(), merged, statistics)
    assert by_checkpoint.layers == by_adapter.layers
    for name in ("relative_drift", "alignment_energy", "overlap"):
        torch.testing.assert_close(getattr(by_checkpoint, name), getattr(by_adapter, name), rtol=1e-3, atol=1e-7)
    others = measure_behaviour(merged, tokenizer, prompts, base=tiny_model().eval(), max_new_tokens=5, progress=False)
    torch.testing.assert_close(others.kl_first_tokens, answers.kl_first_tokens, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(others.nll_tuned, answers.nll_tuned, rtol=1e-3, atol=1e-4)
    statistics.input_of = {name: key for name, key in statistics.input_of.items() if "q_proj" in name}
    assert len(DriftReport.measure_checkpoint(tiny_model(), merged, statistics).layers) == 2, "those that are covered"
    with pytest.raises(ValueError, match="has no layer 'model.layers.0.self_attn.q_proj' of the base model's shape"):
        DriftReport.measure_checkpoint(tiny_model(), tiny_model(num_attention_heads=2, head_dim=4), statistics)
    statistics.input_of = {}
    with pytest.raises(ValueError, match="cover no layer"):
        DriftReport.measure_checkpoint(tiny_model(), merged, statistics)


def test_overlap_of_a_layer_equals_dense(tokenizer, alignment_rows):
    model = adapted(0.2)
    statistics = estimate_fisher(tiny_model(), alignment_rows, tokenizer, progress=False)
    report = DriftReport.measure(model, statistics)
    layer = adapted_layers(model)[3]
    metric = statistics.metric(layer.name)
    delta = (layer.factors().scaling * layer.factors().B @ layer.factors().A).detach().double()
    aligned = reference.projected(delta, metric.input, None, 0.9)
    W = layer.module.get_base_layer().weight.double()
    eta = 1 + 4 * torch.sigmoid(((W + delta).abs() / W.square().mean().sqrt() - 1) / 0.25)
    expected = (eta * (aligned * (delta - aligned)).abs()).sum() / W.square().sum()
    # The stored eigenvectors are bfloat16, and orthonormal to that.
    assert report.overlap[3].item() == pytest.approx(expected.item(), rel=5e-3)


def test_interrupted_report_goes_on_where_it_stopped(tmp_path, tokenizer, prompts):
    model, asked = adapted(0.1), []
    whole = measure_behaviour(model, tokenizer, prompts, max_new_tokens=4, batch_size=2, progress=False)
    path = tmp_path / "unfinished.jsonl"
    store = AnswerCache(path, "settings")
    generate = model.generate

    def interrupted(**kwargs):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(1)
        return generate(**kwargs)

    model.generate = interrupted
    with pytest.raises(KeyboardInterrupt):
        measure_behaviour(model, tokenizer, prompts, store=store, max_new_tokens=4, batch_size=2, progress=False)
    with path.open("a") as file:
        file.write('{"key": "cut o')
    model.generate = generate
    again = AnswerCache(path, "settings")
    assert len(again.answers) == 6
    resumed = measure_behaviour(model, tokenizer, prompts, store=again, max_new_tokens=4, batch_size=2, progress=False)
    assert resumed.answers == whole.answers
    assert AnswerCache(path, "other settings").key("Base model", "x") not in again.answers


def test_paired_test_and_conditions(tokenizer, prompts, alignment_rows):
    model = adapted(0.2)
    report = DriftReport.measure(model, estimate_fisher(tiny_model(), alignment_rows, tokenizer, progress=False))
    with pytest.raises(ValueError, match="no figure 'refusal_drop'; it has relative_drift, largest_drift"):
        Condition.parse("refusal_drop>0.05").holds(report)
    report.behaviour = measure_behaviour(model, tokenizer, prompts, max_new_tokens=2, progress=False)
    answers = report.behaviour
    answers.refused_base = torch.tensor([True, True, True, True, False, False, False])
    answers.refused_tuned = torch.tensor([False, False, False, True, False, True, False])
    assert answers.paired_p_value() == pytest.approx(0.25) and answers.paired_p_value(unsafe=False) == 1.0
    assert figures(report)["refusal_drop"] == 0.75 and figures(report)["over_refusal_rise"] == pytest.approx(1 / 3)
    assert Condition.parse(" refusal_drop >= 7.5e-1").holds(report) == "refusal_drop is 0.75, which is >= 0.75."
    assert Condition.parse("refusal_drop>0.75").holds(report) is None
    assert Condition.parse("margin_drop_unsafe>100").holds(report), "what was not measured is not passed"
    for text in ("refusal_drop", "refusal_drop=0.1", "refusal_drop>", "refusal_drop>a"):
        with pytest.raises(ValueError, match="is no condition"):
            Condition.parse(text)


def test_answers_are_one_json_object_per_prompt(tokenizer, prompts):
    answers = measure_behaviour(adapted(0.1), tokenizer, prompts, max_new_tokens=2, progress=False)
    assert len(answers.answers) == len(prompts) and json.loads(json.dumps(answers.answers[0])) == answers.answers[0]
    assert {entry["expected"] for entry in answers.answers} == {"refuse", "comply"}
    assert answers.answers[0]["judge"].startswith("refusal-strings")
