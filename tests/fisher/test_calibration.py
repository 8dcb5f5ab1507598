"""What a drift means in KL: the curve against brute force, and the translation by it."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from agl_trl import estimate_fisher
from agl_trl.data.alignment import AlignmentRow, select_rows, tokenize_rows
from agl_trl.fisher.calibration import DRIFTS, calibrate, drift_at, is_calibrated
from agl_trl.fisher.protected_rows import COMPLY, REFUSE, reference_answers
from agl_trl.fisher.reference_answers import ReferenceAnswers
from agl_trl.fisher.statistics import FisherStatistics
from agl_trl.miniworld import alignment_dataset, load_model, load_tokenizer
from agl_trl.modeling.lora import base_weight, linear_layers
from tests.helpers.models import ARCHITECTURES, chat_rows, tiny_model
from tests.helpers.reference import dense, quadratic_form


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def measured(request, tokenizer, alignment_rows):
    """A model with an adapter that has not moved, its statistics and reference answers."""
    targets = ARCHITECTURES[request.param][1]
    model = get_peft_model(tiny_model(request.param), LoraConfig(r=4, target_modules=targets))
    model.get_output_embeddings().weight.data.mul_(20)
    statistics = estimate_fisher(model, alignment_rows, tokenizer, progress=False)
    rows = tokenize_rows(list(alignment_rows), tokenizer)
    references = ReferenceAnswers.measure(model, tokenizer, rows, ["alignment"] * len(rows), progress=False)
    return model, statistics, references


@pytest.fixture
def calibrated(measured) -> FisherStatistics:
    model, statistics, references = measured
    own = copy.deepcopy(statistics)
    calibrate(model, own, references, progress=False)
    return own


def test_kl_rises_with_drift_in_every_direction(calibrated):
    curve = calibrated.metadata["kl_curve"]
    assert curve["drifts"] == list(DRIFTS) and len(curve["kl"]) == 3
    for kl in curve["kl"]:
        assert len(kl) == len(DRIFTS) and 0 < kl[0] and kl == sorted(kl)
    for kl in curve["kl"]:  # near the reference, and above rounding, both are quadratic in the size of the update
        assert 5 < kl[4] / kl[2] < 15


def test_on_an_aligned_model_the_way_of_a_task_costs_more():
    """Teaching the answers of other rows breaks refusals at a drift at which a random direction leaves them whole."""
    model, tokenizer, dataset = load_model(), load_tokenizer(), alignment_dataset()
    statistics = estimate_fisher(model, dataset, tokenizer, num_samples=32, progress=False)
    kinds = {kind: select_rows(dataset, 16, 0, unsafe=kind == REFUSE) for kind in (REFUSE, COMPLY)}
    references = reference_answers(model, tokenizer, kinds, max_length=None, progress=False)
    calibrate(model, statistics, references, progress=False)
    drift, spread = drift_at(statistics, 0.02)
    assert spread > 2
    statistics.metadata["kl_curve"]["kl"].pop()  # without the gradient's direction
    assert drift_at(statistics, 0.02)[0] > 2 * drift


def test_the_drift_that_is_asked_for_is_that_of_the_model(measured, monkeypatch):
    """Brute force: the dense ΔW of every layer out of what the hooks add, in the metric, when KL is measured."""
    model, statistics, references = measured
    layers = linear_layers(model)
    seen, own = [], ReferenceAnswers.kl

    @torch.no_grad()
    def delta(module):
        identity = torch.eye(base_weight(module).shape[1])
        return (module(identity) - module.get_base_layer()(identity)).double()

    def kl(self, model, indices=None):
        drifts = []
        for name, module in layers.items():
            X = dense(statistics.inputs[statistics.input_of[name]])
            moved = quadratic_form(delta(module).T, X, None)
            drifts.append(moved / statistics.weight_norm[name].double() ** 2)
        seen.append((torch.stack(drifts).mean().item(), indices))
        return own(self, model, indices)

    monkeypatch.setattr(ReferenceAnswers, "kl", kl)
    calibrate(model, copy.deepcopy(statistics), references, progress=False)
    assert [drift for drift, _ in seen] == pytest.approx([*DRIFTS] * 3, rel=1e-3)
    assert len({tuple(indices) for _, indices in seen}) == 1 and len(seen[0][1]) == 8


def test_a_backward_pass_keeps_what_is_of_one_row(measured):
    """Of eight long rows together it would keep more than the model; passes without a gradient keep nothing."""
    model, statistics, references = measured
    passes: list[tuple[bool, int]] = []

    def count(module, args, kwargs):
        passes.append((torch.is_grad_enabled(), len(kwargs["input_ids"])))

    with model.get_base_model().register_forward_pre_hook(count, with_kwargs=True):
        calibrate(model, copy.deepcopy(statistics), references, progress=False)
    assert [rows for gradient, rows in passes if gradient] == [1] * 8
    assert [rows for gradient, rows in passes if not gradient] == [8] * 3 * len(DRIFTS)


def test_a_long_prompt_with_the_long_answer_of_another_row_is_read(tokenizer):
    """Each row fits the 128 positions of the model, and the way of a task swaps their answers."""
    model = tiny_model("gpt2")
    rows = [AlignmentRow([5] * 101, 98), AlignmentRow([7] * 101, 4)]
    references = ReferenceAnswers.measure(model, tokenizer, rows, [REFUSE] * 2, progress=False)
    statistics = estimate_fisher(model, chat_rows(4, "tell me of", "No {}."), tokenizer, progress=False)
    calibrate(model, statistics, references, progress=False)
    assert is_calibrated(statistics) and torch.tensor(statistics.metadata["kl_curve"]["kl"]).isfinite().all()


def test_model_and_random_state_are_left_as_they_were(measured):
    model, statistics, references = measured
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    calibrate(model, copy.deepcopy(statistics), references, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_calibrated_again_it_is_the_same_and_is_saved(measured, calibrated, tmp_path):
    model, statistics, references = measured
    again = copy.deepcopy(statistics)
    assert not is_calibrated(again)
    calibrate(model, again, references, progress=False)
    assert again.metadata == calibrated.metadata
    calibrated.save_pretrained(tmp_path)
    assert FisherStatistics.from_pretrained(tmp_path).metadata["kl_curve"] == calibrated.metadata["kl_curve"]
    calibrate(model, again, references, seed=1, progress=False)
    assert again.metadata != calibrated.metadata


def test_translation_reads_the_curve_between_its_points_and_beyond_them(measured):
    statistics = copy.deepcopy(measured[1])
    drifts = [1e-4, 1e-3, 1e-2]
    statistics.metadata["kl_curve"] = {"drifts": drifts, "kl": [[1e-6, 1e-5, 1e-4], [1e-4, 1e-2, 1.0]]}
    assert drift_at(statistics, 1e-2) == pytest.approx((1e-3, 1e3)), "the last is that of a gradient"
    assert drift_at(statistics, 1e-3)[0] == pytest.approx(1e-3 / 10**0.5), "straight in logarithms"
    assert drift_at(statistics, 1e-5)[0] == pytest.approx(1e-5), "before its first point"
    assert drift_at(statistics, 10.0)[0] == pytest.approx(0.1), "after its last"
    statistics.metadata["kl_curve"]["kl"] = [[1e-6, 1e-4, 1e-5], [0.0, 0.0, 0.0]]
    assert drift_at(statistics, 1e-4)[0] > 0, "a flat one too has an answer"


def test_a_model_that_breaks_at_a_large_drift_has_a_curve_all_the_same(measured, monkeypatch, tmp_path):
    """In float16 a large step overflows: the KL there is no number, and beyond any budget."""
    model, statistics, references = measured
    own, calls = ReferenceAnswers.kl, []

    def kl(self, model, indices=None):
        calls.append(indices)
        return own(self, model, indices) * (torch.nan if len(calls) % len(DRIFTS) == 0 else 1.0)

    monkeypatch.setattr(ReferenceAnswers, "kl", kl)
    statistics = copy.deepcopy(statistics)
    calibrate(model, statistics, references, progress=False)
    drift, spread = drift_at(statistics, 5.0)
    assert 0 < drift < 1 and 1 <= spread < 1e4
    statistics.save_pretrained(tmp_path)
