"""The number is a property of the update: the same for an adapter and its merged copy, and no gate passes what it leaves out."""

import pytest
import torch

from agl_trl import DriftReport, FisherStatistics, estimate_fisher
from agl_trl.drift.gate import judge
from agl_trl.drift.thresholds import Condition
from agl_trl.drift.verdict import Outcome
from agl_trl.hub.card_text import render_evidence
from agl_trl.modeling.lora import adapted_layers
from agl_trl.modeling.trained_tensors import changed_tensors
from tests.helpers.models import moved_adapter, tiny_model


CONFIGS = {
    "q and v": dict(target_modules=["q_proj", "v_proj"]),
    "all": dict(target_modules="all-linear"),
    "one block": dict(target_modules=["q_proj", "k_proj", "up_proj"], layers_to_transform=[1]),
    "one layer": dict(target_modules=["down_proj"], layers_to_transform=[0], layers_pattern="layers"),
    "ranks": dict(target_modules=["q_proj", "o_proj"], rank_pattern={"o_proj": 7}),
    "alphas": dict(target_modules=["q_proj", "up_proj"], alpha_pattern={"up_proj": 50}),
    "rslora": dict(target_modules=["q_proj", "gate_proj"], r=8, use_rslora=True, alpha_pattern={"q_proj": 3}),
    "fused": dict(target_modules=["c_attn"], fan_in_fan_out=True),
    "head": dict(target_modules=["q_proj", "lm_head"]),
}


def statistics_of(model, tokenizer, rows) -> FisherStatistics:
    return estimate_fisher(model, rows, tokenizer, progress=False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("name", CONFIGS)
def test_merged_adapter_has_the_number_of_the_adapter(name, dtype, tolerance, tokenizer, alignment_rows):
    architecture = "gpt2" if name == "fused" else "llama"
    model = moved_adapter(tiny_model(architecture, dtype=dtype), 0.003, **CONFIGS[name])  # a drift of about 1e-2
    statistics = statistics_of(tiny_model(architecture, dtype=dtype), tokenizer, alignment_rows)
    if name == "head":  # which the statistics of a plain model leave out
        statistics = statistics_of(model, tokenizer, alignment_rows)
    adapter = DriftReport.measure(model, statistics)
    logged = statistics.drift_of(adapted_layers(model))([layer.factors() for layer in adapted_layers(model)]).mean()
    assert adapter.mean_relative_drift == pytest.approx(logged.item()), "what training logs"
    tuned = model.merge_and_unload()
    merged = DriftReport.measure_checkpoint(tiny_model(architecture, dtype=dtype), tuned, statistics)
    assert merged.num_moved == len(adapter.layers) and not merged.uncovered
    assert merged.mean_relative_drift == pytest.approx(adapter.mean_relative_drift, rel=tolerance)
    assert merged.relative_drift.max().item() == pytest.approx(adapter.relative_drift.max().item(), rel=tolerance)
    for factor in (0.9, 1.1):
        gate = Condition("relative_drift", ">", factor * adapter.mean_relative_drift)
        expected = Outcome.PASS if factor > 1 else Outcome.FAIL
        assert judge(adapter, [gate]).outcome is judge(merged, [gate]).outcome is expected


def test_layers_that_did_not_move_do_not_dilute_the_number(tokenizer, alignment_rows):
    statistics = statistics_of(tiny_model(), tokenizer, alignment_rows)
    few = DriftReport.measure(moved_adapter(tiny_model(), target_modules=["q_proj"]), statistics)
    many = moved_adapter(tiny_model(), target_modules="all-linear")
    for layer in adapted_layers(many):
        if "q_proj" not in layer.name:
            layer.parameters()[1].data.zero_()
    report = DriftReport.measure(many, statistics)
    merged = DriftReport.measure_checkpoint(tiny_model(), many.merge_and_unload(), statistics)
    assert report.mean_relative_drift == pytest.approx(merged.mean_relative_drift, rel=1e-3)
    assert report.num_moved == merged.num_moved == len(few.layers) == 2
    assert "mean over 2 layers that moved, of 14" in report.summary()


def test_checkpoint_saved_in_another_type_has_not_moved(tokenizer, alignment_rows):
    statistics = statistics_of(tiny_model(), tokenizer, alignment_rows)
    report = DriftReport.measure_checkpoint(tiny_model(), tiny_model(dtype=torch.bfloat16), statistics)
    assert report.mean_relative_drift == 0.0 and not report.uncovered


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({"trainable_token_indices": [3, 7]}, "model.embed_tokens.weight"),
    ],
)
def test_no_gate_on_weights_passes_what_they_leave_out(config, name, tokenizer, alignment_rows, tmp_path):
    statistics = statistics_of(tiny_model(), tokenizer, alignment_rows)
    model = moved_adapter(tiny_model(), **config)
    for layer in adapted_layers(model):
        layer.parameters()[1].data.zero_()
    adapter = DriftReport.measure(model, statistics)
    merged = DriftReport.measure_checkpoint(tiny_model(), model.merge_and_unload(), statistics)
    for report in (adapter, merged):
        assert report.mean_relative_drift == pytest.approx(0.0, abs=1e-9)
        report.save_pretrained(tmp_path)
        for shown in (report, DriftReport.from_pretrained(tmp_path)):
            assert [*shown.uncovered] == [name] and shown.uncovered[name] > 1e-3
            for figure in ("relative_drift", "largest_drift"):
                (rule,) = judge(shown, [Condition(figure, ">", 1.0)]).rules
                assert rule.outcome is Outcome.FAIL and f"'{name}'" in rule.sentence and rule.sentence.endswith(".")
            assert f"not in these figures  1 changed tensors, most of all {name}" in shown.summary()
            assert f"| {name} | {shown.uncovered[name]:.2e} |" in render_evidence(shown, None, True)
    same = DriftReport.measure(moved_adapter(tiny_model()), statistics)
    assert same.uncovered == {} and judge(same, [Condition("relative_drift", ">", 1e9)]).outcome is Outcome.PASS
    assert "not in these figures" not in same.summary() and "Not in it" not in render_evidence(same, None, True)


@pytest.mark.parametrize("shrinkage", [1.0, 0.5])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_lora_on_the_head_is_measured_over_every_token(architecture, shrinkage, tokenizer, alignment_rows):
    model = moved_adapter(tiny_model(architecture), target_modules=["q_proj", "lm_head"])
    with model.disable_adapter():
        statistics = estimate_fisher(model, alignment_rows, tokenizer, shrinkage=shrinkage, progress=False)
    drift = statistics.relative_drift(model)
    assert drift["lm_head"] > 0 and len(drift) == 3
    if shrinkage < 1:
        return
    # By definition: the mean of ‖ΔW x‖² over that of ‖W x‖², over the tokens that count.
    from agl_trl.data.alignment import batches, tokenize_row

    seen: list[torch.Tensor] = []
    handle = model.get_base_model().lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    rows = [tokenize_row(row, tokenizer, 1024) for row in alignment_rows]
    with torch.no_grad(), model.disable_adapter():
        for batch in batches(rows, 4, 0, torch.device("cpu")):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            seen[-1] = seen[-1][batch.token_mask]
    handle.remove()
    (head,) = [layer for layer in adapted_layers(model) if layer.name == "lm_head"]
    A, B, scaling = head.current()
    x = torch.cat(seen)
    expected = (x @ (scaling * B @ A).mT).square().sum() / (x @ head.module.get_base_layer().weight.mT).square().sum()
    assert drift["lm_head"] == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_tensor_beside_the_layers_that_is_not_finite_is_named(value, tokenizer, alignment_rows):
    statistics = statistics_of(tiny_model(), tokenizer, alignment_rows)
    tuned = tiny_model()
    tuned.get_parameter("model.norm.weight").data[3] = value
    assert "model.norm.weight" in changed_tensors(tiny_model(), tuned, ())
    with pytest.raises(ValueError, match=r"The change of 'model\.norm\.weight' is not finite"):
        DriftReport.measure_checkpoint(tiny_model(), tuned, statistics)
    adapter = moved_adapter(tiny_model(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapter.get_output_embeddings().modules_to_save["default"].weight.data[3, 3] = value
    with pytest.raises(ValueError, match=r"The change of 'lm_head\.weight' is not finite"):
        DriftReport.measure(adapter, statistics)
