"""Adapters of other methods than LoRA: the numbers of their dense twin, or none where no layer has a ΔW."""

import json
from math import isnan

import peft
import pytest
import torch
from safetensors import safe_open

from agl_trl import DriftReport, estimate_fisher
from agl_trl.artifacts.files import ArtifactError, load_tensors, save_tensors
from agl_trl.drift.gate import judge
from agl_trl.drift.plots import plot_drift
from agl_trl.drift.thresholds import Condition, figures
from agl_trl.drift.verdict import Outcome
from agl_trl.evaluation.behaviour import measure_behaviour
from agl_trl.evaluation.probes import probe
from agl_trl.hub.card_text import plain
from agl_trl.hub.model_card import attach_card
from agl_trl.modeling.base_and_tuned import BaseAndTuned
from agl_trl.modeling.generation import generate_answers
from agl_trl.modeling.lora import adapted_layers, at_reference, linear_layers, trained_outside_lora
from agl_trl.modeling.tuned_layers import layer_change, tuned_layers
from tests.helpers.models import moved_adapter, moved_by, probe_prompts, tiny_model, tiny_vision_language_model


QUERY = dict(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
WITH_WEIGHTS = {
    "loha": peft.LoHaConfig(r=2, **QUERY),
    "lokr": peft.LoKrConfig(r=2, **QUERY),
    "ia3": peft.IA3Config(feedforward_modules=["down_proj"], **QUERY),
    "oft": peft.OFTConfig(oft_block_size=8, **QUERY),
    "boft": peft.BOFTConfig(boft_block_size=4, **QUERY),
    "vera": peft.VeraConfig(r=2, **QUERY),
    "hra": peft.HRAConfig(r=2, **QUERY),
    "hira": peft.HiraConfig(r=2, **QUERY),
    "shira": peft.ShiraConfig(r=2, **QUERY),
    "miss": peft.MissConfig(r=2, **QUERY),
    "fourierft": peft.FourierFTConfig(n_frequency=20, scaling=1.0, **QUERY),
    "randlora": peft.RandLoraConfig(r=4, **QUERY),
    "vblora": peft.VBLoRAConfig(r=2, vector_length=16, num_vectors=8, **QUERY),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **QUERY),
    "dora": peft.LoraConfig(r=2, use_dora=True, **QUERY),
    "random start": peft.LoraConfig(r=2, init_lora_weights=False, **QUERY),
}
LEARNED = dict(num_virtual_tokens=3, task_type="CAUSAL_LM")
WITHOUT_WEIGHTS = {
    "PROMPT_TUNING": peft.PromptTuningConfig(**LEARNED),
    "PREFIX_TUNING": peft.PrefixTuningConfig(**LEARNED),
    "P_TUNING": peft.PromptEncoderConfig(encoder_hidden_size=16, **LEARNED),
    "CPT": peft.CPTConfig(cpt_token_ids=[5, 6], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1], task_type="CAUSAL_LM"),
    "ADAPTION_PROMPT": peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
}


def statistics_of(model, tokenizer, rows, **options):
    return estimate_fisher(model, rows, tokenizer, progress=False, **options)


@pytest.mark.parametrize("shrinkage", [1.0, 0.5])
@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_weights_are_those_of_the_dense_twin(name, shrinkage, tokenizer, alignment_rows):
    model = moved_by(tiny_model(), WITH_WEIGHTS[name], 0.02)
    with model.disable_adapter():  # of the very layers that it adapts, as for an adapter without statistics
        statistics = statistics_of(model, tokenizer, alignment_rows, shrinkage=shrinkage)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = DriftReport.measure(model, statistics)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), (
        "the model is left as it was"
    )
    merged = DriftReport.measure_checkpoint(tiny_model(), model.merge_and_unload(), statistics)
    assert report.layers == merged.layers and len(report.layers) == 4 and report.mean_relative_drift > 1e-6
    for figure in ("relative_drift", "alignment_energy", "overlap"):
        torch.testing.assert_close(getattr(report, figure), getattr(merged, figure), rtol=1e-3, atol=1e-9)
    assert report.mean_relative_drift == pytest.approx(merged.mean_relative_drift, rel=1e-3)
    assert report.uncovered == merged.uncovered == {} and report.without_weights is None
    for factor in (0.9, 1.1):
        gate = Condition("relative_drift", ">", factor * merged.mean_relative_drift)
        assert judge(report, [gate]).outcome is (Outcome.PASS if factor > 1 else Outcome.FAIL)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("opt", peft.LoHaConfig(r=2, target_modules=["q_proj", "fc1"], task_type="CAUSAL_LM")),
        ("opt", peft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "fc1"], task_type="CAUSAL_LM")),
        ("opt", peft.IA3Config(target_modules=["q_proj", "fc1"], feedforward_modules=[], task_type="CAUSAL_LM")),
        ("gpt2", peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], task_type="CAUSAL_LM")),
    ],
    ids=["loha", "oft", "ia3", "ia3 transposed"],
)
def test_biases_and_transposed_layers(architecture, config, tokenizer, alignment_rows):
    """IA3 scales a bias too, which is no part of the drift of a weight."""
    model = tiny_model(architecture)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    model = moved_by(model, config, 0.02)
    with model.disable_adapter():
        statistics = statistics_of(model, tokenizer, alignment_rows)
    report = DriftReport.measure(model, statistics)
    base = tiny_model(architecture)
    base.load_state_dict(start)
    merged = DriftReport.measure_checkpoint(base, model.merge_and_unload(), statistics)
    torch.testing.assert_close(report.relative_drift, merged.relative_drift, rtol=1e-3, atol=1e-9)
    assert report.uncovered == pytest.approx(merged.uncovered, rel=1e-3)
    assert bool(report.uncovered) == isinstance(config, peft.IA3Config)


def test_nothing_is_rounded_in_a_half_precision_base():
    model = moved_by(tiny_model(dtype=torch.bfloat16), peft.LoHaConfig(r=2, **QUERY), 0.02)
    for _, module in tuned_layers(model, "default"):
        W, delta = module.get_base_layer().weight.detach().clone(), module.get_delta_weight("default")
        assert W.dtype == torch.bfloat16 and delta.dtype == torch.float32
        assert (layer_change(module).delta - delta).norm() < 1e-4 * delta.norm()
        module.merge()
        rounded = module.get_base_layer().weight.float() - W.float()
        assert (rounded - delta).norm() > 2e-3 * delta.norm(), "which is what a merge makes of it"


def test_adapter_that_has_not_moved_has_no_drift(tokenizer, alignment_rows):
    model = peft.get_peft_model(tiny_model(), peft.OFTConfig(oft_block_size=8, **QUERY))
    report = DriftReport.measure(model, statistics_of(tiny_model(), tokenizer, alignment_rows))
    assert report.mean_relative_drift == 0.0 and report.num_moved == 0 and not report.uncovered
    with pytest.raises(ValueError, match="needs Fisher statistics"):
        DriftReport.measure(model, None)


def test_layer_that_is_no_matrix_is_named_with_the_norm_of_its_change(tokenizer, alignment_rows):
    model = moved_by(tiny_model(), peft.LilyConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    report = DriftReport.measure(model, statistics_of(tiny_model(), tokenizer, alignment_rows))
    assert report.layers == [] and "LILY" in report.without_weights
    assert sorted(report.uncovered) == [f"model.layers.{block}.self_attn.q_proj.weight" for block in (0, 1)]
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    torch.manual_seed(3)
    x = torch.randn(1, 4000, 32)
    with torch.no_grad():
        found = ((layer(x) - layer.base_layer(x)).norm() / layer.base_layer(x).norm()).item()
    assert report.uncovered["model.layers.0.self_attn.q_proj.weight"] == pytest.approx(found, rel=0.2)


def test_lora_that_acts_on_a_part_of_the_tokens_has_no_number_of_the_weights():
    """Of an activated LoRA: applied to anything but its invocation, its layers do nothing, which is no zero."""
    report = DriftReport.measure(moved_adapter(tiny_model(), alora_invocation_tokens=[7, 8]), None)
    assert report.layers == [] and report.without_weights == "an activated LoRA acts on a part of the tokens alone"


def test_trained_bias_is_named_beside_the_drift(tokenizer, alignment_rows):
    model = moved_adapter(tiny_model(), lora_bias=True)
    report = DriftReport.measure(model, statistics_of(tiny_model(), tokenizer, alignment_rows))
    plain_lora = DriftReport.measure(
        moved_adapter(tiny_model()), statistics_of(tiny_model(), tokenizer, alignment_rows)
    )
    assert len(report.layers) == len(plain_lora.layers) == 2 and report.mean_relative_drift > 0
    assert sorted(report.uncovered) == [f"model.layers.{block}.self_attn.q_proj.bias" for block in (0, 1)]


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_method_without_a_change_of_weights_has_no_number_of_them(name, tokenizer, tmp_path):
    model = moved_by(tiny_model(), WITHOUT_WEIGHTS[name], 0.5)
    assert linear_layers(model) == {}
    report = DriftReport.measure(model, None)
    report.behaviour = measure_behaviour(model, tokenizer, probe_prompts(), max_new_tokens=4, progress=False)
    assert report.behaviour.kl_first_tokens.min() > 1e-6 and report.behaviour.hidden_drift[-1] > 1e-6
    path = report.save_pretrained(tmp_path)
    with safe_open(path, framework="pt") as file:
        assert not {"relative_drift", "alignment_energy", "task_energy", "overlap"} & {*file.keys()}
        assert "mean_relative_drift" not in json.dumps(file.metadata())
    for shown in (report, DriftReport.from_pretrained(tmp_path)):
        assert isnan(shown.mean_relative_drift) and shown.num_moved == 0 and shown.layers == []
        reason = f"this adapter, of type {name}, changes no linear layer by a matrix"
        assert shown.summary().startswith(f"relative drift        not measured: {reason}\n")
        assert "0.000e+00" not in shown.summary() and "KL" in shown.summary()
        assert not {"relative_drift", "largest_drift"} & {*figures(shown)} and "kl_unsafe" in figures(shown)
        for figure in ("relative_drift", "largest_drift"):
            (rule,) = judge(shown, [Condition(figure, ">", 1e9)]).rules
            assert rule.outcome is Outcome.FAIL
            assert rule.sentence == f"{figure} is not measured, since {reason}: set a limit on the answers instead."
        assert judge(shown, [Condition("kl_unsafe", ">", 1e9)]).outcome is Outcome.PASS
    plot_drift(report, tmp_path / "agl" / "drift.png")
    assert (tmp_path / "agl" / "drift.png").stat().st_size > 1000
    attach_card(tmp_path / "README.md", "adapter", report, statistics_published=False)
    card = (tmp_path / "README.md").read_text()
    assert f"The drift of the weights was not measured: {plain(reason)}." in card
    assert (
        "relative drift, mean" not in card and "type: relative_drift" not in card and "Fisher statistics" not in card
    )
    assert "type: kl_divergence" in card and "- lora\n" not in card and "LoRA adapter" not in card


def test_report_with_half_of_its_weights_is_refused(tmp_path):
    path = DriftReport.measure(moved_by(tiny_model(), WITHOUT_WEIGHTS["PROMPT_TUNING"]), None).save_pretrained(
        tmp_path
    )
    tensors, metadata = load_tensors(path)
    for changes in ({"without_weights": None}, {"summary": {"mean_relative_drift": 0.0}}, {"layers": ["a"]}):
        save_tensors(path, tensors, metadata | changes)
        with pytest.raises(ArtifactError, match="incomplete or malformed"):
            DriftReport.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_answers_and_kl_are_of_the_model_as_it_answers(name, tokenizer):
    """By hand, one prompt at a time and without a cache; with the adapter off, of the base model."""
    model, base = moved_by(tiny_model(), WITHOUT_WEIGHTS[name], 0.5), tiny_model().eval()
    prompts = ["tell me", "say it again, please"]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=6, progress=False)
    with model.disable_adapter():
        off = generate_answers(model, tokenizer, prompts, max_new_tokens=6, progress=False)
    assert off == generate_answers(base, tokenizer, prompts, max_new_tokens=6, progress=False) != answers
    kl = probe(BaseAndTuned(model), tokenizer, prompts, off, torch.tensor([True, True])).kl_first_tokens
    for prompt, answer, base_answer, found in zip(prompts, answers, off, kl.tolist(), strict=True):
        question = tokenizer(prompt)["input_ids"]
        ids = list(question)
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
        assert tokenizer.decode(ids[len(question) :], skip_special_tokens=True).strip() == answer
        ids = question + tokenizer(base_answer, add_special_tokens=False)["input_ids"][:8]
        with torch.no_grad():
            p, q = (
                one(input_ids=torch.tensor([ids]))
                .logits[0, -1 - (len(ids) - len(question)) : -1]
                .double()
                .log_softmax(-1)
                for one in (base, model)
            )
        assert found == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])  # apart from the head, and tied to it
def test_lora_on_embeddings_is_named_with_its_norm(architecture, tokenizer, alignment_rows):
    model = moved_adapter(tiny_model(architecture), target_modules=["q_proj", "embed_tokens"])
    name = "model.embed_tokens.weight"
    assert [layer.name for layer in adapted_layers(model)] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert any("lora_embedding_A" in one for one in trained_outside_lora(model))
    statistics = statistics_of(tiny_model(architecture), tokenizer, alignment_rows)
    report = DriftReport.measure(model, statistics)
    module = model.get_base_model().model.embed_tokens
    W = module.get_base_layer().weight
    assert report.uncovered == {name: pytest.approx((module.get_delta_weight("default").norm() / W.norm()).item())}
    (rule,) = judge(report, [Condition("relative_drift", ">", 1e9)]).rules
    assert rule.outcome is Outcome.FAIL and name in rule.sentence
    alone = DriftReport.measure(moved_adapter(tiny_model(architecture)), statistics)
    assert report.mean_relative_drift != 0 and len(report.layers) == len(alone.layers)
    only = DriftReport.measure(moved_adapter(tiny_model(architecture), target_modules=["embed_tokens"]), None)
    assert only.layers == [] and [*only.uncovered] == [name] and "not in these figures" in only.summary()


def test_continued_adapter_starts_where_its_embeddings_started():
    model = moved_adapter(tiny_model(), target_modules=["q_proj", "embed_tokens"])
    ids = torch.arange(20)[None]
    with torch.no_grad():
        start = model(input_ids=ids).logits
        layers = [layer.with_reference() for layer in adapted_layers(model)]
        assert all(tensor.relative_change() == 0 for tensor in layers[0].beside)
        module = model.get_base_model().model.embed_tokens
        before = module.get_delta_weight("default").clone()
        for tensor in layers[0].beside:
            tensor.parameter().add_(0.05)
        change = (module.get_delta_weight("default") - before).norm() / module.get_base_layer().weight.norm()
        assert {t.name: t.relative_change() for t in layers[0].beside}["model.embed_tokens.weight"] == pytest.approx(
            change.item(), rel=1e-5
        )
        assert not torch.allclose(model(input_ids=ids).logits, start, atol=1e-4)
        with at_reference(model, layers):
            torch.testing.assert_close(model(input_ids=ids).logits, start, rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", ["lora", "loha"])
def test_attention_of_a_mixture_of_experts(method, architecture, tokenizer, alignment_rows):
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = {"lora": peft.LoraConfig, "loha": peft.LoHaConfig}[method](
        r=2, target_modules=modules, task_type="CAUSAL_LM"
    )
    model = moved_by(tiny_model(architecture), config, 0.02)
    statistics = statistics_of(tiny_model(architecture), tokenizer, alignment_rows)
    report = DriftReport.measure(model, statistics)
    merged = DriftReport.measure_checkpoint(tiny_model(architecture), model.merge_and_unload(), statistics)
    assert len(report.layers) == 8 and not report.uncovered and not merged.uncovered
    assert report.mean_relative_drift == pytest.approx(merged.mean_relative_drift, rel=1e-3)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_experts_in_one_tensor_are_named_with_the_norm_of_their_change(architecture, tokenizer, alignment_rows):
    experts = "mlp.experts.down_proj"
    model = moved_adapter(tiny_model(architecture), target_modules=["q_proj"], target_parameters=[experts])
    statistics = statistics_of(tiny_model(architecture), tokenizer, alignment_rows)
    report = DriftReport.measure(model, statistics)
    merged = DriftReport.measure_checkpoint(tiny_model(architecture), model.merge_and_unload(), statistics)
    assert len(report.layers) == 2 and len(report.uncovered) == 2
    assert report.uncovered == pytest.approx(merged.uncovered, rel=1e-3)
    assert report.mean_relative_drift == pytest.approx(merged.mean_relative_drift, rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "loha"])
def test_language_layers_of_a_model_that_sees(method, tokenizer, alignment_rows):
    pattern = r".*language_model.*(q_proj|down_proj)"
    config = {"lora": peft.LoraConfig, "loha": peft.LoHaConfig}[method](
        r=2, target_modules=pattern, task_type="CAUSAL_LM"
    )
    model = moved_by(tiny_vision_language_model(), config, 0.02)
    statistics = statistics_of(tiny_vision_language_model(), tokenizer, alignment_rows)
    report = DriftReport.measure(model, statistics)
    merged = DriftReport.measure_checkpoint(tiny_vision_language_model(), model.merge_and_unload(), statistics)
    assert len(report.layers) == 4 and not report.uncovered
    assert report.mean_relative_drift == pytest.approx(merged.mean_relative_drift, rel=1e-3)
