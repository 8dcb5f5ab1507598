"""What a file of Fisher statistics must hold, checked value by value before anything is made of it."""

from itertools import pairwise
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..artifacts.files import ArtifactError
from ..artifacts.schema import (
    BaseModelDescription,
    Integer,
    Metadata,
    Number,
    check_metadata,
    check_names,
    check_numbers,
    check_tensor_names,
    short_repr,
)
from ..objective.covariance import LowRankCovariance


STEEPEST_RISE = 1e-6  # relative; eigenvalues are stored in descending order
LEAST_DRIFT, LARGEST_DRIFT, LARGEST_KL = 1e-12, 1e6, 1e6  # of a curve
NEGATIVE_TOLERANCE = 1e-3  # of a KL, in nats: rounding
ORTHONORMAL_TOLERANCE = 0.05  # bfloat16 moves VᵀV by 0.01 at most


class KLCurve(Metadata):
    """What relative drifts mean in KL, in nats per answer token, along a few directions."""

    drifts: list[Number]
    kl: list[list[Number]]


class FisherMetadata(Metadata):
    """Metadata of Fisher statistics."""

    shrinkage: Number
    input_of: dict[str, str]
    shapes: dict[str, list[Integer]]
    base_model: BaseModelDescription
    seed: Integer
    rank: Integer = 0
    num_rows: Integer = 0
    max_length: Integer | None = None
    fisher_type: str | None = None
    dataset_fingerprint: str = ""
    skipped_layers: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
    kl_curve: KLCurve | None = None


def check_fisher(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """
    Check tensors and metadata of Fisher statistics, those of schema 1 brought to today's names.

    Raises:
        [`ArtifactError`]: Half a sentence.
    """
    if "damping" in metadata:  # of schema 1
        metadata["shrinkage"] = metadata.pop("damping")
    check_metadata(metadata, FisherMetadata)
    input_of, shapes, shrinkage = metadata["input_of"], metadata["shapes"], metadata["shrinkage"]
    if not 0 <= shrinkage <= 1:
        raise ArtifactError(f"'shrinkage' is {short_repr(shrinkage)}, not between 0 and 1")
    check_names(input_of)
    if {*shapes} != {*input_of}:
        raise ArtifactError("'shapes' and 'input_of' name other layers")
    for name, shape in shapes.items():
        if len(shape) != 2 or min(shape) < 1:
            raise ArtifactError(f"layer '{name}' has shape {short_repr(shape)}")
        first = input_of[name]
        if input_of.get(first) != first or shapes[first][1:] != shape[1:]:
            raise ArtifactError(f"layer '{name}' can't share the input of {short_repr(first)}")
    if (curve := metadata.get("kl_curve")) is not None:
        _check_curve(curve["drifts"], curve["kl"])
    covariances = {f"inputs.{name}": shapes[name][1] for name in input_of.values()}
    if shrinkage < 1:
        covariances |= {f"outputs.{name}": shape[0] for name, shape in shapes.items()}
    parts = {f"{prefix}.{part}" for prefix in covariances for part in LowRankCovariance._fields}
    norms = {f"weight_norm.{name}" for name in input_of}
    check_tensor_names(tensors, parts | norms | {"num_tokens"})
    for name in sorted(norms):
        check_numbers(tensors[name], name, ())
        if tensors[name] <= 0:
            raise ArtifactError(f"'{name}' is {tensors[name]:.3g}, not above 0")
    count = tensors["num_tokens"]
    if count.dtype != torch.int64 or count.shape != () or count < 1:
        raise ArtifactError(
            f"'num_tokens' is no number of tokens but {count.dtype} of shape {short_repr([*count.shape])}"
        )
    for prefix, dim in covariances.items():
        _check_covariance(
            LowRankCovariance(*(tensors[f"{prefix}.{part}"] for part in LowRankCovariance._fields)), prefix, dim
        )


def _check_curve(drifts: list[float], curves: list[list[float]]) -> None:
    if not all(before < after for before, after in pairwise([0.0, *drifts])):
        raise ArtifactError(f"the drifts of 'kl_curve' do not rise from 0: {short_repr(drifts)}")
    if len(drifts) < 2 or not curves or any(len(curve) != len(drifts) for curve in curves):
        raise ArtifactError(
            f"'kl_curve' has curves of {short_repr([*map(len, curves)])} points for {len(drifts)} drifts"
        )
    sane = LEAST_DRIFT <= drifts[0] and drifts[-1] <= LARGEST_DRIFT
    if not sane or not all(-NEGATIVE_TOLERANCE <= value <= LARGEST_KL for curve in curves for value in curve):
        raise ArtifactError("'kl_curve' has a KL below 0, or numbers of no sane size")


def _check_covariance(covariance: LowRankCovariance, name: str, dim: int) -> None:
    shapes = [tuple(tensor.shape) for tensor in covariance]
    k = covariance.eigenvalues.numel()
    if shapes != [(dim, k), (k,), ()] or not 0 < k <= dim:
        raise ArtifactError(
            f"the tensors of '{name}' have shapes {short_repr(shapes)}, which do not fit dimension {dim}"
        )
    check_numbers(covariance.eigenvectors, f"{name}.eigenvectors", (dim, k))
    check_numbers(covariance.eigenvalues, f"{name}.eigenvalues", (k,), least=0)
    check_numbers(covariance.remainder, f"{name}.remainder", (), least=0)
    if (covariance.eigenvalues.diff() > STEEPEST_RISE * covariance.eigenvalues[0]).any():
        raise ArtifactError(f"the eigenvalues of '{name}' do not descend")
    V = covariance.eigenvectors.float()
    if not ((V.mT @ V - torch.eye(k)).abs() <= ORTHONORMAL_TOLERANCE).all():
        raise ArtifactError(f"the eigenvectors of '{name}' are not orthonormal")
