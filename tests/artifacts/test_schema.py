"""Checks that every file of ours shares: each says in half a sentence what differs, on one line and short."""

from pathlib import Path

import pytest
import torch

from agl_trl.artifacts.files import ArtifactError
from agl_trl.artifacts.schema import (
    Integer,
    Metadata,
    Number,
    check_metadata,
    check_names,
    check_numbers,
    check_tensor_names,
    refuse,
    short_repr,
)


class Example(Metadata):
    seed: Integer
    share: Number
    names: dict[str, list[Integer]]
    note: str | None = None


GOOD = {"seed": 1, "share": 0.5, "names": {"a": [1, 2]}}


def test_names_that_are_not_known_are_free():
    check_metadata(GOOD, Example)
    check_metadata(GOOD | {"later": [1], "note": None, "share": 1}, Example)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": "a"}, "'seed' is 'a', not a valid integer"),
        ({"seed": 1.0}, "'seed' is 1.0, not a valid integer"),
        ({"seed": True}, "'seed' is True, not a valid integer"),
        ({"seed": 10**30}, "'seed' is a huge number, not of sane size"),
        ({"share": 1e301}, "'share' is 1e+301, not of sane size"),
        ({"share": "0.5"}, "'share' is '0.5', not a valid number"),
        ({"names": {"a": [1, "x"]}}, "'names.a.1' is 'x', not a valid integer"),
        ({"note": 3}, "'note' is 3, not a valid string"),
    ],
)
def test_types_are_as_in_json_and_the_first_difference_is_named(changes, sentence):
    with pytest.raises(ArtifactError) as failed:
        check_metadata(GOOD | changes, Example)
    assert str(failed.value) == sentence


def test_what_is_missing_is_named():
    with pytest.raises(ArtifactError, match=r"^'share' is missing$"):
        check_metadata({"seed": 1, "names": {}}, Example)


def test_values_of_a_file_are_shown_on_one_short_line():
    assert short_repr("a\nb\x1b[31m") == r"'a\nb\x1b[31m'" and short_repr(10**400) == "a huge number"
    assert len(short_repr("x" * 10**6)) == 58 and short_repr("x" * 100).endswith("…")


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ([], "it names 0 layers, of which 0 differ"),
        (["a", "b", "a"], "it names 3 layers, of which 2 differ"),
        (["a", "../b"], "'../b' is no name of a layer"),
        (["<b>"], "'<b>' is no name of a layer"),
        (["x" * 301], "is no name of a layer"),
        ([""], "'' is no name of a layer"),
    ],
)
def test_names_of_layers_are_plain_and_different(names, sentence):
    check_names(["model.layers.0.mlp.up_proj", "lm_head-2"])
    with pytest.raises(ArtifactError) as failed:
        check_names(names)
    assert str(failed.value).endswith(sentence)


def test_tensors_are_exactly_the_expected_ones():
    tensors = {"a": torch.ones(1), "b": torch.ones(1)}
    check_tensor_names(tensors, {"a", "b"})
    with pytest.raises(ArtifactError, match=r"^tensor 'c' is missing$"):
        check_tensor_names(tensors, {"a", "c"})
    with pytest.raises(ArtifactError, match=r"^tensor 'b' does not belong there$"):
        check_tensor_names(tensors, {"a"})


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (torch.ones(2, 2), "'t' is torch.float32 of shape [2, 2], not floats of (2,)"),
        (torch.ones(2, dtype=torch.int64), "'t' is torch.int64 of shape [2], not floats of (2,)"),
        (torch.ones(2, dtype=torch.complex64), "'t' is torch.complex64 of shape [2], not floats of (2,)"),
        (torch.tensor([1.0, torch.nan]), "'t' is not finite"),
        (torch.tensor([1.0, torch.inf]), "'t' is not finite"),
        (torch.tensor([1.0, -0.1]), "'t' is below 0"),
    ],
)
def test_numbers_are_finite_floats_of_a_shape(tensor, sentence):
    check_numbers(torch.tensor([0.0, 5.0]).bfloat16(), "t", (2,), least=0)
    with pytest.raises(ArtifactError) as failed:
        check_numbers(tensor, "t", (2,), least=0)
    assert str(failed.value) == sentence


def test_refusal_names_kind_and_file():
    told = str(refuse("Fisher statistics", Path("a/b.safetensors"), ArtifactError("'seed' is missing")))
    assert (
        told == "The Fisher statistics in 'a/b.safetensors' can't be used, incomplete or malformed: 'seed' is missing."
    )
