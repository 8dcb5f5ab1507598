"""The report in weight space against dense float64, and as a file: read back whole, also of the first schema."""

from importlib.resources import files

import pytest
import torch
from safetensors.torch import save_file

from agl_trl import DriftReport, FisherStatistics, estimate_fisher
from agl_trl.artifacts.files import ArtifactError, canonical_json, load_tensors, sha256
from agl_trl.evaluation.behaviour import measure_behaviour
from agl_trl.modeling.lora import adapted_layers
from tests.helpers import reference
from tests.helpers.models import adapted, probe_prompts, tiny_model
from tests.helpers.reference import dense_metric
from tests.helpers.reports import LAYERS, behaviour_by_hand, report_by_hand


@pytest.fixture
def statistics(tokenizer, alignment_rows) -> FisherStatistics:
    return estimate_fisher(tiny_model(), alignment_rows, tokenizer, progress=False)


def test_figures_of_every_layer_equal_dense_float64(statistics):
    model = adapted(0.2)
    report = DriftReport.measure(model, statistics)
    for i, layer in enumerate(adapted_layers(model)):
        metric = statistics.metric(layer.name)
        X, scale = dense_metric(metric)[0], metric.weight_norm.double() ** 2
        A, B, s = layer.factors()
        delta = (s * B @ A).detach().double()
        aligned = reference.projected(delta, metric.input, None, 0.9)
        whole, inside = (reference.quadratic_form(part, X, None) / scale for part in (delta, aligned))
        # The stored eigenvectors are bfloat16, and orthonormal to that.
        assert report.relative_drift[i].item() == pytest.approx(whole.item(), rel=1e-3)
        assert report.alignment_energy[i].item() == pytest.approx(inside.item(), rel=1e-2)
        assert report.task_energy[i].item() == pytest.approx((whole - inside).item(), rel=5e-2)
        W = layer.module.get_base_layer().weight.double()
        eta = 1 + 4 * torch.sigmoid(((W + delta).abs() / W.square().mean().sqrt() - 1) / 0.25)
        overlap = (eta * (aligned * (delta - aligned)).abs()).sum() / W.square().sum()
        assert report.overlap[i].item() == pytest.approx(overlap.item(), rel=2e-2)
    assert report.mean_relative_drift == pytest.approx(sum(statistics.relative_drift(model).values()) / 14, rel=1e-5)


def test_merged_checkpoint_is_measured_as_its_adapter(statistics, tokenizer):
    model, prompts = adapted(0.2), probe_prompts()
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


def test_report_of_another_adapter_is_told(statistics, tmp_path):
    model = adapted(0.1)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    report = DriftReport.measure(model, statistics)
    with pytest.raises(ArtifactError, match="the report names no sha256"):
        report.check_describes(tmp_path)
    report.adapter_sha256, report.global_step = sha256(file), 40
    report.check_describes(tmp_path)
    report.check_describes(file)
    loaded = DriftReport.from_pretrained(report.save_pretrained(tmp_path))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # still a finite number
    file.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        loaded.check_describes(tmp_path)
    assert str(caught.value) == (
        f"The report is of another adapter: its sha256 starts with {report.adapter_sha256[:12]} (step 40), that of "
        f"'{file}' with {sha256(file)[:12]}."
    )
    with pytest.raises(ArtifactError, match="there is no such file"):
        loaded.check_describes(tmp_path / "nowhere")


@pytest.mark.parametrize("behaviour", [None, behaviour_by_hand()], ids=["weights", "answers"])
def test_report_survives_the_round_trip(behaviour, tmp_path):
    report = report_by_hand(behaviour)
    path = report.save_pretrained(tmp_path)
    loaded = DriftReport.from_pretrained(tmp_path)
    for name in ("layers", "global_step", "budget_multiplier", "adapter_sha256", "metadata"):
        assert getattr(loaded, name) == getattr(report, name), name
    for name in ("relative_drift", "alignment_energy", "task_energy", "overlap"):
        assert torch.equal(getattr(loaded, name), getattr(report, name)), name
    assert {name: values.tolist() for name, values in loaded.history.items()} == {"step": [1, 2], "loss": [2, 1.5]}
    if behaviour is not None:
        for name, value in vars(behaviour).items():
            same = loaded.behaviour.__dict__[name]
            assert torch.equal(same.nan_to_num(), value.nan_to_num()) if torch.is_tensor(value) else same == value, (
                name
            )
    assert loaded.save_pretrained(tmp_path / "again").read_bytes() == path.read_bytes()


def test_file_of_schema_1_is_read_with_its_shrinkage(tmp_path):
    """Schema 1 said damping for shrinkage and had no checksum."""
    tensors, metadata = load_tensors(report_by_hand().save_pretrained(tmp_path))
    metadata["fisher"]["damping"] = metadata["fisher"].pop("shrinkage")
    early = tmp_path / "early.safetensors"
    save_file(tensors, early, {"agl": canonical_json(metadata | {"schema_version": 1})})
    used = DriftReport.from_pretrained(early).metadata["fisher"]
    assert used == {"shrinkage": 0.25, "num_tokens": 90, "seed": 3}


@pytest.mark.parametrize("name", ["agl", "plain"])
def test_reports_that_the_package_ships_are_read(name):
    """They were written with schema 1, of statistics of the input side alone."""
    path = files("agl_trl.space") / "adapters" / name
    report = DriftReport.from_pretrained(path)
    assert report.metadata["fisher"]["shrinkage"] == 1.0 and "damping" not in report.metadata["fisher"]
    assert report.adapter_sha256 == sha256(path / "adapter_model.safetensors") and len(report.layers) == 28


def test_summary_says_what_the_tensors_say():
    lines = report_by_hand(behaviour_by_hand()).summary().splitlines()
    assert lines[0] == "relative drift        2.500e-03  (mean over 4 layers)"
    assert lines[1] == f"largest               4.000e-03  ({LAYERS[3]})" and lines[2] == "in alignment subspace 50%"
    assert lines[3].startswith(
        "refuses unsafe        100.0% before, 25.0% after (95 % interval 4.6% to 69.9%, 4 prompts"
    )
    assert lines[3].endswith("paired p 0.25); KL 0.250 nats per token")
    assert lines[4].startswith("refuses safe          0.0% before, 33.3% after") and "KL 0.100" in lines[4]
    assert lines[5] == "hidden states         moved most after layer 1: 1 - cos 0.250"
    assert len(lines) == 6, "a margin that was not measured is no line"
    assert len(report_by_hand().summary().splitlines()) == 3


def test_run_that_diverged_writes_no_report(tmp_path):
    report = report_by_hand()
    report.relative_drift[1] = torch.nan
    with pytest.raises(ValueError, match="The run has diverged: the relative drift is not finite"):
        report.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
