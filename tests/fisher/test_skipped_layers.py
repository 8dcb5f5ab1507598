"""Layers that do not see every token of a text: left out of a plain model and named, refused in an adapter."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

import agl_trl.fisher.partial_sums
from agl_trl import FisherStatistics, estimate_fisher
from agl_trl.cli.app import app
from agl_trl.data.alignment import tokenize_row
from agl_trl.fisher.cost import fisher_cost, seconds_by_trial
from agl_trl.modeling.lora import adapted_layers, linear_layers
from tests.helpers.models import MIXTURES, tiny_model, tiny_vision_model
from tests.helpers.processes import COMMON, launch
from tests.helpers.skipping_worker import statistics_of


FULL = dict(rank=4096, shrinkage=0.5, dtype=torch.float32, progress=False)
PARTLY_USED = {
    "mamba": (lambda: tiny_model("mamba"), "backbone.layers.0.mixer.dt_proj", 6),
    "jamba": (lambda: tiny_model("jamba"), "model.layers.0.mamba.dt_proj", 10),
    "vision": (tiny_vision_model, "model.multi_modal_projector.linear_1", 14),
}


@pytest.mark.parametrize("shrinkage", [1.0, 0.5])
@pytest.mark.parametrize("name", PARTLY_USED)
def test_layers_of_a_plain_model_that_a_text_does_not_reach_are_skipped(
    name, shrinkage, tmp_path, tokenizer, alignment_rows
):
    build, unused, used = PARTLY_USED[name]
    options = dict(rank=4, shrinkage=shrinkage, batch_size=4)
    statistics = estimate_fisher(build(), alignment_rows, tokenizer, progress=False, **options)
    skipped = statistics.metadata["skipped_layers"]
    assert unused in skipped and len(statistics.input_of) == used
    assert {*skipped} | {*statistics.input_of} == {*linear_layers(build())}
    statistics.save_pretrained(tmp_path)
    again = FisherStatistics.from_pretrained(tmp_path)
    again.check_fits(build(), {name: m for name, m in linear_layers(build()).items() if name in again.input_of})
    assert again.metadata["skipped_layers"] == skipped
    cost = fisher_cost(build(), rank=4, shrinkage=shrinkage)
    assert cost.layers == used and cost.inputs == len(statistics.inputs)
    rows = [tokenize_row(row, tokenizer, None) for row in alignment_rows]
    trial = dict(fisher_type="projection", rank=4, shrinkage=shrinkage, batch_size=4, seed=0)
    assert seconds_by_trial(build(), rows, tokenizer, **trial) > 0


def test_layers_that_see_some_tokens_are_skipped_and_the_rest_is_as_without_them(tokenizer, alignment_rows):
    """Experts read some of the rows; what shares their input is measured all the same."""

    class Mixture(torch.nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.aside, self.mlp, self.expert = torch.nn.Linear(32, 32), mlp, torch.nn.Linear(32, 32)

        def forward(self, x):
            with torch.no_grad():  # reads all tokens, is the first to read them, and passes no gradient on
                self.aside(x)
                self.expert(x.flatten(0, 1)[x.flatten(0, 1)[:, 0] > 0])
            return self.mlp(x)

    model, expected = tiny_model(), estimate_fisher(tiny_model(), alignment_rows, tokenizer, **FULL)
    model.model.layers[1].mlp = Mixture(model.model.layers[1].mlp)
    found = estimate_fisher(model, alignment_rows, tokenizer, **FULL)
    assert found.metadata["skipped_layers"] == ["model.layers.1.mlp.aside", "model.layers.1.mlp.expert"]
    assert found.num_tokens == expected.num_tokens and len(found.input_of) == len(expected.input_of)
    for name, first in expected.input_of.items():
        ours = name.replace("layers.1.mlp.", "layers.1.mlp.mlp.")
        for one, other in (
            (found.inputs[found.input_of[ours]], expected.inputs[first]),
            (found.outputs[ours], expected.outputs[name]),
        ):
            torch.testing.assert_close(one.eigenvalues, other.eigenvalues)


def test_an_adapted_layer_that_a_text_does_not_reach_is_refused(tokenizer, alignment_rows):
    model = get_peft_model(tiny_vision_model(), LoraConfig(r=2, target_modules=["q_proj", "linear_1"]))
    with pytest.raises(
        ValueError, match=r"saw no tokens .* over text \(a vision tower.*leave it out of `target_modules`"
    ):
        estimate_fisher(model, alignment_rows, tokenizer, progress=False)


def test_a_model_without_a_layer_that_sees_tokens_is_refused(tokenizer, alignment_rows):
    model = tiny_model(num_hidden_layers=1)
    model.model.layers = torch.nn.ModuleList()
    model.model.unused = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="No linear layer of the model saw all tokens"):
        estimate_fisher(model, alignment_rows, tokenizer, progress=False)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_mixtures_are_measured_plain_and_guarded_in_their_attention(architecture, tokenizer, alignment_rows):
    plain = estimate_fisher(tiny_model(architecture), alignment_rows, tokenizer, progress=False)
    assert len(plain.input_of) == 8
    model = get_peft_model(tiny_model(architecture), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(
        ValueError, match=r"experts in one tensor.*target_modules=\['q_proj', 'k_proj', 'v_proj', 'o_proj'\]"
    ):
        adapted_layers(model)  # which training asks; `drift` measures it, and its statistics are of the linear layers
    assert {*estimate_fisher(model, alignment_rows, tokenizer, progress=False).input_of} == {*plain.input_of}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(tiny_model(architecture), LoraConfig(r=2, target_modules=targets))
    assert len(estimate_fisher(model, alignment_rows, tokenizer, progress=False).input_of) == 8


def test_the_command_says_what_it_leaves_out(tmp_path, tokenizer, alignment_rows):
    tiny_model("mamba").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    alignment_rows.to_json(tmp_path / "rows.jsonl")
    files = {"--model": "base", "--dataset": "rows.jsonl", "--output-dir": "out"}
    options = [text for option, name in files.items() for text in (option, str(tmp_path / name))]
    result = CliRunner().invoke(app, ["fisher", *options])
    assert result.exit_code == 0, result.output
    names = [f"backbone.layers.{i}.mixer.dt_proj" for i in (0, 1)]
    assert f"do not see every token of a text: 2 layers ({', '.join(names)})" in " ".join(result.output.split())
    assert FisherStatistics.from_pretrained(tmp_path / "out").metadata["skipped_layers"] == names


def test_two_processes_leave_out_what_one_does(tmp_path):
    """Also a layer that only one of them reaches, which there is the first to read what others read."""
    done = launch(COMMON, tmp_path, "-m", "tests.helpers.skipping_worker", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    skipped = {
        "mamba": [f"backbone.layers.{i}.mixer.dt_proj" for i in (0, 1)],
        "partial": ["model.layers.1.mlp.expert"],
    }
    for name, names in skipped.items():
        alone = statistics_of(name)
        assert alone.metadata["skipped_layers"] == names
        files = [tmp_path / f"{name}-{rank}" / "agl" / "fisher.safetensors" for rank in (0, 1)]
        assert files[0].read_bytes() == files[1].read_bytes()
        together = FisherStatistics.from_pretrained(files[0])
        assert together.metadata["skipped_layers"] == names
        assert together.input_of == alone.input_of and together.num_tokens == alone.num_tokens
        for side in ("inputs", "outputs"):
            ours, others = getattr(together, side), getattr(alone, side)
            assert {*ours} == {*others}
            for layer in ours:
                torch.testing.assert_close(ours[layer].eigenvalues, others[layer].eigenvalues, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["mamba", "jamba"])
def test_interrupted_pass_with_skipped_layers_ends_with_the_same_bytes(
    architecture, tmp_path, tokenizer, alignment_rows, monkeypatch
):
    monkeypatch.setattr(agl_trl.fisher.partial_sums, "SAVE_EVERY", 0.0)
    options = dict(rank=4, shrinkage=0.5, batch_size=2, progress=False)
    model, passes = tiny_model(architecture), []
    whole = estimate_fisher(model, alignment_rows, tokenizer, **options)
    assert whole.metadata["skipped_layers"]

    def count(*_):
        passes.append(1)
        if len(passes) == 4:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(count)
    with pytest.raises(KeyboardInterrupt):
        estimate_fisher(model, alignment_rows, tokenizer, resume_dir=tmp_path, **options)
    handle.remove()
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    resumed = estimate_fisher(model, alignment_rows, tokenizer, resume_dir=tmp_path, **options)
    handle.remove()
    assert len(passes) == 6, "three of five batches were done"
    files = [found.save_pretrained(tmp_path / name) for name, found in (("whole", whole), ("resumed", resumed))]
    assert files[0].read_bytes() == files[1].read_bytes()
