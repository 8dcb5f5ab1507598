"""Training-time methods of the field since, against dense vectors or by hand."""

import pytest
import torch
from datasets import Dataset

from agl_trl import FisherStatistics
from agl_trl.data.alignment import select_rows, tokenize_rows
from agl_trl.drift.report import DriftReport
from agl_trl.miniworld import alignment_dataset, load_model, load_tokenizer, task_dataset
from agl_trl.modeling.generation import generate_answers
from agl_trl.modeling.lora import adapted_layers
from agl_trl.objective.covariance import LowRankCovariance
from agl_trl.trainer.callback import AlignGuardCallback
from examples.benchmark.guardspace import NullSpace, leading
from examples.benchmark.kl_sft import anchored, token_losses
from examples.benchmark.methods import METHODS, Setting
from examples.benchmark.safegrad import Surgery, surgery
from examples.benchmark.setting import published_statistics
from examples.benchmark.ssah import critical, importance
from examples.benchmark.star_dss import scored, scores


def trainer(name, tmp_path, steps=3):
    made = METHODS[name].make(Setting(tmp_path, 0, steps, load_tokenizer(), task_dataset("steps").select(range(64))))
    made.train()
    return made


def flat(parts) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def differ(first, second) -> bool:
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    return any(not torch.equal(p, q) for p, q in pairs)


def test_safegrad_projects_a_conflict_of_the_whole_vector_out():
    torch.manual_seed(0)
    alignment = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    # The first tensor alone agrees, the whole conflicts: what counts is the whole.
    gradient = [0.1 * alignment[0], -3 * alignment[1] + torch.randn(5, dtype=torch.float64)]
    g, a = flat(gradient), flat(alignment)
    assert g @ a < 0 < (gradient[0] * alignment[0]).sum()
    got = surgery(gradient, alignment)
    torch.testing.assert_close(flat(got), g - a * (g @ a) / (a @ a))
    assert abs(flat(got) @ a) < 1e-12
    torch.testing.assert_close(flat(surgery(gradient, alignment, coef=0.5)), flat(got) + 0.5 * a)


def test_safegrad_leaves_what_agrees():
    torch.manual_seed(0)
    a = [torch.randn(3, 4)]
    assert torch.equal(surgery([2 * a[0]], a)[0], 2 * a[0])
    assert torch.equal(surgery(a, [torch.zeros(3, 4)])[0], a[0]), "at the first step the alignment's is zero"


def test_surgery_inside_agl_sees_the_gradient_of_the_task_alone(tmp_path, monkeypatch):
    """It comes before AGL's own gradient, which a conflict with the alignment would otherwise never leave."""
    made = METHODS["agl-surgery"].make(
        Setting(tmp_path, 0, 3, load_tokenizer(), task_dataset("steps").select(range(64)))
    )
    order: list[str] = []
    for kind in (Surgery, AlignGuardCallback):
        own = kind.on_pre_optimizer_step

        def noted(self, *args, own=own, **kwargs):
            order.append(self.__class__.__name__)
            own(self, *args, **kwargs)

        monkeypatch.setattr(kind, "on_pre_optimizer_step", noted)
    made.train()
    assert len(order) == 6 and order[::2] == ["Surgery"] * 3 and "Surgery" not in order[1::2]
    plain = trainer("agl", tmp_path / "agl")
    assert differ(plain, made)


def test_safegrad_changes_the_run(tmp_path):
    plain, ours, added = (trainer(name, tmp_path / name, steps=4) for name in ("lora", "safegrad", "safegrad-1"))
    assert differ(plain, ours) and differ(ours, added)


def test_ssah_freezes_what_safety_needs_and_utility_does_not():
    safety, utility = torch.tensor([5.0, 4.0, 3.0, 1.0]), torch.tensor([5.0, 1.0, 1.0, 1.0])
    assert critical(safety, utility, 0.25).tolist() == [False, True, False, False], (
        "not the largest, the most of its own"
    )
    assert critical(safety, utility, 0.5).tolist() == [False, True, True, False]


def test_ssah_importance_is_the_rms_of_the_output_where_answers_are_predicted():
    model, tokenizer = load_model(), load_tokenizer()
    (row,) = tokenize_rows(alignment_dataset().select([0]), tokenizer)
    name = "model.layers.1.mlp.gate_proj"
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    with torch.no_grad():
        model(torch.tensor([row.input_ids]))
    handle.remove()
    expected = seen[0][row.answer_start - 1 : -1].square().mean(0).sqrt()
    torch.testing.assert_close(importance(model, [row], tokenizer.pad_token_id)[name], expected)


def test_ssah_leaves_the_share_of_rows_at_zero(tmp_path):
    for layer in adapted_layers(trainer("ssah-0.3", tmp_path).model):
        _, B = layer.parameters()
        still = (B == 0).all(1).sum().item()
        assert still == round(0.3 * len(B)), layer.name
        B.sum().backward()
        assert B.grad.count_nonzero() == B.numel(), "whoever trains on, trains all of them"


def test_anchored_sft_is_this_sum_with_this_gradient():
    torch.manual_seed(0)
    logits, reference = torch.randn(2, 2, 4, 5, dtype=torch.float64).unbind()
    logits.requires_grad_()
    input_ids = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 0]])
    labels = torch.tensor([[-100, -100, 2, 3], [-100, 3, 2, -100]])
    tokens = [(0, 1, 2), (0, 2, 3), (1, 0, 3), (1, 1, 2)]  # row, position that predicts, token
    p, q = logits.softmax(-1), reference.softmax(-1)
    nll = -torch.stack([p[row, at, token].log() for row, at, token in tokens])
    kl = torch.stack([(q[row, at] * (q[row, at] / p[row, at]).log()).sum() for row, at, _ in tokens])
    got = [part.double() for part in token_losses(logits, reference, input_ids, labels)]
    torch.testing.assert_close(got, [nll, kl], rtol=1e-5, atol=1e-6)
    for dft, weight in ((False, 1.0), (True, (-nll).exp().detach())):
        expected = (weight * nll).mean() + 0.3 * kl.mean()
        ours = anchored(*got, 0.3, dft)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        gradients = (torch.autograd.grad(part, logits, retain_graph=True)[0] for part in (ours, expected))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_anchored_sft_without_coefficient_is_sft_and_the_reference_is_the_adapter_off(tmp_path):
    setting = Setting(tmp_path, 0, 1, load_tokenizer(), task_dataset("steps").select(range(32)))
    made = METHODS["kl-sft-1"].make(setting)
    inputs = next(iter(made.get_train_dataloader()))
    nll, kl = made.losses(inputs)
    assert kl.abs().max() < 1e-5, "the adapter has not moved"
    plain = METHODS["lora"].make(setting).compute_loss(made.model, inputs)
    torch.testing.assert_close(nll.mean(), plain)
    with torch.no_grad():
        for layer in adapted_layers(made.model):
            layer.parameters()[1].add_(0.01)
    assert made.losses(inputs)[1].min() > 0


NAME = "model.layers.1.mlp.gate_proj"


@pytest.mark.parametrize("name", ["oft", "osf-0.5"])
def test_orthogonal_adapters_keep_their_form_and_have_a_drift(name, tmp_path):
    made, W = trainer(name, tmp_path, steps=2), load_model().get_submodule(NAME).weight.detach()
    layer = made.model.get_base_model().get_submodule(NAME)
    with torch.no_grad():
        tuned = layer(torch.eye(W.shape[1])).mT
    assert 1e-6 < (tuned - W).norm() / W.norm() < 0.5, "it has moved"
    if name == "oft":  # lengths of the rows of W, and angles between them
        assert (tuned @ tuned.mT - W @ W.mT).norm() < 0.05 * (W @ (tuned - W).mT).norm()
    else:
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        k = len(S) // 2
        assert (U[:, :k].mT @ (tuned - W) @ Vt[:k].mT).norm() < 0.05 * (tuned - W).norm()
    statistics = FisherStatistics.from_pretrained(published_statistics(tmp_path))
    report = DriftReport.measure(made.model, statistics)
    assert len(report.layers) == 28 and report.mean_relative_drift > 0


def test_guardspace_takes_the_fewest_directions_that_hold_the_share():
    Q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q
    X = LowRankCovariance(Q, torch.tensor([6.0, 3.0, 0.9, 0.1]), torch.zeros(()))
    assert [leading(X, energy).shape[1] for energy in (0.5, 0.6, 0.61, 0.9, 0.95, 0.999)] == [1, 1, 2, 2, 3, 4]
    assert torch.equal(leading(X, 0.9), Q[:, :2])


def test_guardspace_keeps_the_update_from_what_unsafe_rows_put_in(tmp_path):
    made = trainer("guardspace-0.8", tmp_path)
    (callback,) = (c for c in made.callback_handler.callbacks if isinstance(c, NullSpace))
    for layer in adapted_layers(made.model):
        (A, B), U = layer.parameters(), callback.directions[layer.name]
        assert 0 < U.shape[1] < U.shape[0]
        assert (B @ (A @ U)).norm() < 1e-5 * (B @ A).norm(), layer.name
        assert (B @ A).norm() > 0
    # The directions are those of the inputs: on an unsafe row most of what goes in lies in them.
    (row,) = tokenize_rows(select_rows(alignment_dataset(), 1, 0), load_tokenizer())
    model, seen = load_model(), []
    handle = model.get_submodule(NAME).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][0]))
    with torch.no_grad():
        model(torch.tensor([row.input_ids]))
    handle.remove()
    x = seen[0][1:]
    assert (x @ callback.directions[NAME]).norm() ** 2 > 0.6 * x.norm() ** 2


def test_star_scores_are_of_the_answer_so_far_and_end_with_its_beginning():
    ratio = torch.tensor([[9.0, -1.0, -2.0, 0.5, 0.0, -4.0, -50.0], [1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]]).bool()
    so_far = torch.tensor([-1.0, -3.0, -2.5, -2.5, -6.5, -6.5, 1.0, 2.0])
    torch.testing.assert_close(scores(ratio, mask, 5.0), torch.sigmoid(5 + so_far))
    nll, kl, score = torch.tensor([2.0, 4.0]), torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.25])
    assert scored(nll, kl, score, 2.0).item() == (2 + 0.25 * 4 + 0.75 * 2 * 1) / 2


def test_star_guard_finds_hostile_rows_unsafe_and_benign_ones_safe(tmp_path):
    clean, mixed = task_dataset("steps"), task_dataset("steps", hostile=0.3, seed=0)
    hostile = [i for i, (one, other) in enumerate(zip(clean, mixed, strict=True)) if one != other][:32]
    means = []
    for rows in (clean.select(range(32)), mixed.select(hostile)):
        made = METHODS["star-dss-1"].make(Setting(tmp_path, 0, 1, load_tokenizer(), rows))
        inputs = next(iter(made.get_train_dataloader()))
        means.append(made.guard(inputs).mean().item())
        assert made.compute_loss(made.model, inputs).requires_grad
    assert means[0] > 0.8 and means[1] < 0.2, means


def test_the_judge_finds_hostile_answers_unsafe_and_refusals_safe_once_they_are_some(tmp_path):
    """Three rows: a hostile one, a benign one, and the aligned model's own refusal of the hostile one's prompt."""
    hostile = next(a for a, b in zip(task_dataset("steps", hostile=0.3), task_dataset("steps"), strict=True) if a != b)
    tokenizer, benign = load_tokenizer(), task_dataset("steps")[0]
    (text,) = generate_answers(load_model(), tokenizer, [hostile["prompt"]], max_new_tokens=32, progress=False)
    refusal = {**hostile, "completion": [{"role": "assistant", "content": text}]}
    rows = Dataset.from_list([hostile, benign, refusal])
    made = METHODS["star-dss-judged-1"].make(Setting(tmp_path, 0, 1, tokenizer, rows))
    first, second, third = made.judged.values()
    assert not first.any() and second.all() and third[5:].all()
    batch = made.data_collator([made.train_dataset[2], made.train_dataset[0]])
    torch.testing.assert_close(made.guard(batch), torch.cat([third, first]))
    made.train()
    assert made.state.global_step == 1
