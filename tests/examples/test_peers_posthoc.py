"""Peer methods of the benchmark that work on weights or on the start of training: each against dense float64 formulas."""

import pytest
import torch

from agl_trl.data.alignment import tokenize_row
from agl_trl.miniworld import load_model, load_tokenizer, task_dataset
from agl_trl.modeling.lora import adapted_layers, base_weight, linear_layers
from examples.benchmark.lox import extrapolation
from examples.benchmark.methods import METHODS, Setting
from examples.benchmark.safe_lora import alignment_matrix
from examples.benchmark.salora import output_directions
from examples.benchmark.splora import ediem


NAMES = ["lora", "safe-lora", "safe-lora-exact", "splora", "splora-cosine", "lox"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict:
    """A trainer per method after a few steps."""
    trainers = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        setting = Setting(folder, 0, 4, load_tokenizer(), task_dataset("steps").select(range(64)))
        trainers[name] = METHODS[name].make(setting)
        trainers[name].train()
    return trainers


@pytest.fixture(scope="module")
def alignment() -> dict[str, torch.Tensor]:
    """`W_aligned − W_base` in float64 by layer."""
    base = linear_layers(load_model("base"))
    return {
        n: (base_weight(m).double() - base_weight(base[n]).double()) for n, m in linear_layers(load_model()).items()
    }


def updates(trainer) -> dict[str, torch.Tensor]:
    """ΔW of every layer, dense, in float64."""
    return {
        layer.name: (layer.current().scaling * layer.current().B.double() @ layer.current().A.double()).detach()
        for layer in adapted_layers(trainer.model)
    }


def cosines(plain, alignment, C) -> dict[str, float]:
    return {
        n: torch.cosine_similarity((C(alignment[n]) @ W).flatten(), W.flatten(), 0).item() for n, W in plain.items()
    }


def fast(V):
    return V @ V.mT / V.norm()


def exact(V, energy=0.5):
    U, S, _ = torch.linalg.svd(V)
    k = next(k for k in range(1, len(S) + 1) if S[:k].square().sum() >= energy * S.square().sum())
    return U[:, :k] @ torch.linalg.pinv(U[:, :k])


@pytest.mark.parametrize(("name", "C"), [("safe-lora", fast), ("safe-lora-exact", exact)])
def test_safe_lora_projects_what_points_away(name, C, trained, alignment):
    plain, ours = updates(trained["lora"]), updates(trained[name])
    cos = cosines(plain, alignment, C)
    assert trained[name].cosines.tolist() == pytest.approx(list(cos.values()), abs=1e-4)
    for layer, W in plain.items():
        expected = C(alignment[layer]) @ W if cos[layer] <= trained[name].threshold else W
        torch.testing.assert_close(ours[layer], expected, atol=1e-4 * W.norm().item(), rtol=1e-4)
    assert trained[name].projected.any()


def test_safe_lora_projects_the_given_number_of_layers(trained):
    trainer = trained["safe-lora"]
    copy = type(trainer)
    kept = {layer.name: layer.parameters()[1].detach().clone() for layer in adapted_layers(trained["lora"].model)}
    for layer in adapted_layers(trainer.model):
        layer.parameters()[1].data.copy_(kept[layer.name])
    trainer.number = 3
    copy.project(trainer)
    assert trainer.projected.sum() == 3
    assert trainer.cosines[trainer.projected].max() < trainer.cosines[~trainer.projected].min()


def test_alignment_matrix_by_hand():
    V = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    assert alignment_matrix(V).tolist() == torch.diag(torch.tensor([9 / 5, 16 / 5, 0.0])).tolist()
    assert alignment_matrix(V, 0.6).abs().tolist() == torch.diag(torch.tensor([0.0, 1.0, 0.0])).tolist()
    assert alignment_matrix(V, 0.7).abs().tolist() == torch.diag(torch.tensor([1.0, 1.0, 0.0])).tolist()


def test_splora_removes_layers_and_leaves_the_others(trained, alignment):
    plain = updates(trained["lora"])
    for name in ("splora", "splora-cosine"):
        trainer, ours = trained[name], updates(trained[name])
        assert trainer.pruned.sum() == 10
        for (layer, W), pruned in zip(plain.items(), trainer.pruned, strict=True):
            assert torch.equal(ours[layer], torch.zeros_like(W) if pruned else W)
    by_cosine = sorted(cosines(plain, alignment, fast).items(), key=lambda item: item[1])[:10]
    assert {n for n, pruned in zip(plain, trained["splora-cosine"].pruned, strict=True) if pruned} == dict(
        by_cosine
    ).keys()


def test_ediem_against_all_permutations():
    """With two rows half of the permutations swap them: distances 0 and 2, with quartiles 0 and 2 and a mean of about 1."""
    update = torch.eye(2, dtype=torch.float64) * 2**0.5
    value = ediem(update, update, 4000, torch.Generator().manual_seed(0))
    assert value.item() == pytest.approx(-0.5, abs=0.05)
    torch.manual_seed(0)
    update, other = torch.randn(2, 40, 6, dtype=torch.float64)
    alike = [ediem(a * update + other, update, 50, torch.Generator().manual_seed(0)).item() for a in (2, 1, 0)]
    assert alike[0] < alike[1] < alike[2] and abs(alike[2]) < 3


@pytest.mark.parametrize(("rank", "coef"), [(2, 1.25), (0, 1.0)])
def test_extrapolation_is_the_truncated_svd(rank, coef):
    V = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A, B = extrapolation(V, rank, coef)
    # From the eigenvectors of VᵀV instead of an SVD: V Q_k Q_kᵀ is the best approximation of rank k.
    Q = torch.linalg.eigh(V.mT @ V).eigenvectors[:, -(rank or 5) :]
    torch.testing.assert_close(B @ A, coef * V @ Q @ Q.mT)
    assert A.shape == (rank or 5, 5)


def test_lox_trains_on_the_extrapolated_model(trained, alignment, tmp_path):
    """Before training every matrix is `W + c M_k`; after it the adapter on the aligned model is the same function."""
    setting = Setting(tmp_path, 0, 4, load_tokenizer(), task_dataset("steps").select(range(64)))
    start = METHODS["lox"].make(setting)
    aligned, base = load_model(), load_model("base")
    for layer in adapted_layers(start.model):
        U, S, Vh = torch.linalg.svd(alignment[layer.name])
        expected = base_weight(linear_layers(aligned)[layer.name]) + 1.25 * (U[:, :6] * S[:6]) @ Vh[:6]
        torch.testing.assert_close(base_weight(layer.module).double(), expected, atol=1e-5, rtol=1e-5)
    embed, before = aligned.get_input_embeddings().weight.double(), base.get_input_embeddings().weight.double()
    U, S, Vh = torch.linalg.svd((embed - before).detach(), full_matrices=False)
    expected = embed.detach() + 1.25 * (U[:, :6] * S[:6]) @ Vh[:6]
    torch.testing.assert_close(start.model.get_input_embeddings().weight.double(), expected, atol=1e-5, rtol=1e-5)
    for layer in adapted_layers(start.model):
        torch.nn.init.normal_(layer.parameters()[1], std=0.02)
    same_function(start.model, start.on_aligned())
    assert all(layer.current().A.shape[0] == 14 for layer in adapted_layers(trained["lox"].model))


@torch.no_grad()
def same_function(first, second) -> None:
    ids = torch.arange(30, 70)[None]
    logits = [model.eval()(input_ids=ids).logits for model in (first, second)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_salora_starts_as_the_aligned_model_and_stays_out_of_the_safety_subspace(tmp_path):
    setting = Setting(tmp_path, 0, 4, load_tokenizer(), task_dataset("steps").select(range(64)))
    start, aligned = METHODS["salora"].make(setting), load_model()
    same_function(start.model, aligned)
    # Steps enough for an update that stands well above the rounding of the weights whose difference it is.
    setting = Setting(tmp_path / "trained", 0, 16, load_tokenizer(), task_dataset("steps").select(range(64)))
    after = METHODS["salora"].make(setting)
    after.train()
    weights, ours = linear_layers(aligned), updates(after)
    for layer in adapted_layers(start.model):
        A, CB, s = layer.current()
        V = layer.module.lora_B["default"].parametrizations.weight[0].V.double()
        C = torch.eye(len(V), dtype=torch.float64) - V @ V.mT
        residual = base_weight(weights[layer.name]).double() - s * CB.double() @ A.double()
        torch.testing.assert_close(base_weight(layer.module).double(), residual, atol=1e-5, rtol=1e-5)
        original = layer.module.lora_B["default"].parametrizations.weight.original.double()
        torch.testing.assert_close(CB.double(), C @ original, atol=1e-5, rtol=1e-5)
        # Rank r of W: A₀ spans its first right singular vectors, and AᵀA has its singular values.
        torch.testing.assert_close((A @ A.mT).diagonal(), torch.linalg.svdvals(base_weight(weights[layer.name]))[:8])
        assert V.shape[1] == 32 and s == 1
        # After training too, and the annihilated part is not simply all of it.
        assert (V.mT @ ours[layer.name]).norm() < 1e-4 * ours[layer.name].norm()
        assert ours[layer.name].norm() > 1e-3
    for layer in adapted_layers(start.model):  # any B keeps out, and the written adapter is the trained function
        original = layer.module.lora_B["default"].parametrizations.weight.original
        torch.nn.init.normal_(original, std=0.02)
    same_function(start.model, start.on_aligned())


@torch.no_grad()
def test_output_directions_are_singular_vectors_of_answer_outputs():
    tokenizer, model = load_tokenizer(), load_model()
    rows = list(task_dataset("steps").select(range(5)))
    found = output_directions(model, rows, tokenizer, 3)["model.layers.0.self_attn.q_proj"].double()
    outputs = []
    for row in (tokenize_row(row, tokenizer) for row in rows):
        hidden = model.model.embed_tokens(torch.tensor([row.input_ids]))
        X = model.model.layers[0].input_layernorm(hidden)[0, row.answer_start :].double()
        outputs.append(X @ base_weight(model.model.layers[0].self_attn.q_proj).double().mT)
    expected = torch.linalg.svd(torch.cat(outputs)).Vh[:3].mT
    torch.testing.assert_close(found @ found.mT, expected @ expected.mT, atol=1e-4, rtol=1e-4)
