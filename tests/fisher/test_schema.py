"""What a file of Fisher statistics must hold: the first thing that is wrong is named in half a sentence."""

import copy

import pytest
import torch

from agl_trl import FisherStatistics, estimate_fisher
from agl_trl.artifacts.files import ArtifactError, load_tensors, save_tensors
from agl_trl.fisher.schema import check_fisher
from tests.helpers.models import tiny_model


BLOCK = "model.layers.0."
Q, K, DOWN = BLOCK + "self_attn.q_proj", BLOCK + "self_attn.k_proj", BLOCK + "mlp.down_proj"
X = f"inputs.{Q}"


@pytest.fixture(scope="module")
def good(tokenizer, alignment_rows, tmp_path_factory) -> tuple[dict, dict]:
    """Tensors and metadata as they are in the file."""
    statistics = estimate_fisher(tiny_model(), alignment_rows, tokenizer, shrinkage=0.5, rank=6, progress=False)
    return load_tensors(statistics.save_pretrained(tmp_path_factory.mktemp("good")))


def test_what_was_written_passes(good):
    check_fisher(*good)


@pytest.mark.parametrize(
    ("where", "value", "sentence"),
    [
        (("shrinkage",), 1.5, "'shrinkage' is 1.5, not between 0 and 1"),
        (("shrinkage",), -0.1, "'shrinkage' is -0.1, not between 0 and 1"),
        (("shrinkage",), "half", "'shrinkage' is 'half', not a valid number"),
        (("seed",), 2**70, "'seed' is a huge number, not of sane size"),
        (("shapes", K), [0, 32], f"layer '{K}' has shape [0, 32]"),
        (("shapes", K), [16], f"layer '{K}' has shape [16]"),
        (("input_of", K), "nobody", f"layer '{K}' can't share the input of 'nobody'"),
        (("input_of", K), DOWN, f"layer '{K}' can't share the input of '{DOWN}'"),
        (("input_of", "more"), Q, "'shapes' and 'input_of' name other layers"),
        (("base_model", "config"), [], "'base_model.config' is [], not a valid dictionary"),
    ],
)
def test_metadata_that_is_wrong_is_named(where, value, sentence, good):
    tensors, metadata = good[0], copy.deepcopy(good[1])
    place = metadata
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    with pytest.raises(ArtifactError) as failed:
        check_fisher(tensors, metadata)
    assert str(failed.value) == sentence


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (
            f"{X}.eigenvalues",
            lambda t: t[:-1],
            f"the tensors of '{X}' have shapes [(32, 6), (5,), ()], which do not fit",
        ),
        (f"{X}.eigenvalues", lambda t: t * torch.nan, f"'{X}.eigenvalues' is not finite"),
        (f"{X}.eigenvalues", lambda t: t.flip(0), f"the eigenvalues of '{X}' do not descend"),
        (f"{X}.eigenvalues", lambda t: -t.flip(0), f"'{X}.eigenvalues' is below 0"),
        (f"{X}.eigenvectors", lambda t: 1.1 * t, f"the eigenvectors of '{X}' are not orthonormal"),
        (f"{X}.remainder", lambda t: t - 9, f"'{X}.remainder' is below 0"),
        (f"weight_norm.{K}", lambda t: 0 * t, f"'weight_norm.{K}' is 0, not above 0"),
        ("num_tokens", lambda t: t.float(), "'num_tokens' is no number of tokens but torch.float32 of shape []"),
        ("num_tokens", lambda t: 0 * t, "'num_tokens' is no number of tokens"),
        (f"{X}.remainder", None, f"tensor '{X}.remainder' is missing"),
        (f"outputs.{K}.remainder", None, f"tensor 'outputs.{K}.remainder' is missing"),
        ("more", lambda t: torch.ones(1), "tensor 'more' does not belong there"),
    ],
)
def test_tensors_that_are_wrong_are_named(name, change, sentence, good):
    tensors = dict(good[0])
    changed = tensors.pop(name, None)
    if change is not None:
        tensors[name] = change(changed)
    with pytest.raises(ArtifactError) as failed:
        check_fisher(tensors, good[1])
    assert str(failed.value).startswith(sentence)


def test_half_a_sentence_becomes_one_that_names_the_file(good, tmp_path):
    tensors, metadata = good
    path = tmp_path / "bad.safetensors"
    save_tensors(path, {name: t for name, t in tensors.items() if name != "num_tokens"}, metadata)
    with pytest.raises(ArtifactError) as failed:
        FisherStatistics.from_pretrained(path)
    reason = "tensor 'num_tokens' is missing"
    assert str(failed.value) == f"The Fisher statistics in '{path}' can't be used, incomplete or malformed: {reason}."


def test_input_side_alone_has_no_outputs(good):
    tensors, metadata = good
    with pytest.raises(ArtifactError, match="does not belong there"):
        check_fisher(tensors, metadata | {"shrinkage": 1.0})
    inputs = {name: tensor for name, tensor in tensors.items() if not name.startswith("outputs.")}
    check_fisher(inputs, metadata | {"shrinkage": 1.0})


@pytest.mark.parametrize(
    ("drifts", "kl", "sentence"),
    [
        ([1e-3, 1e-2], [[0.1, 1.0], [0.2]], "'kl_curve' has curves of [2, 1] points for 2 drifts"),
        ([1e-3, 1e-2], [], "'kl_curve' has curves of [] points for 2 drifts"),
        ([], [[]], "'kl_curve' has curves of [0] points for 0 drifts"),
        ([1e-2, 1e-3], [[0.1, 1.0]], "the drifts of 'kl_curve' do not rise from 0: [0.01, 0.001]"),
        ([0.0, 1e-3], [[0.1, 1.0]], "the drifts of 'kl_curve' do not rise from 0: [0.0, 0.001]"),
        ([1e-3, 1e-2], [[0.1, float("nan")]], "'kl_curve.kl.0.1' is nan, not of sane size"),
        ([1e-3, 1e-2], None, "'kl_curve.kl' is None, not a valid list"),
    ],
)
def test_a_curve_that_is_wrong_is_named(drifts, kl, sentence, good):
    check_fisher(good[0], good[1] | {"kl_curve": {"drifts": [1e-3, 1e-2], "kl": [[0.1, 1.0], [0.0, 0.2]]}})
    with pytest.raises(ArtifactError) as failed:
        check_fisher(good[0], good[1] | {"kl_curve": {"drifts": drifts, "kl": kl}})
    assert str(failed.value) == sentence
