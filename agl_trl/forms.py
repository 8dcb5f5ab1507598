"""What the metadata and the tensors of our files must be: checked value by value before anything is made of them."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import torch
from torch import Tensor

from .artifacts import ArtifactError
from .sketch import LowRankCovariance


# A form is a type, a union of types, `[form]` for a list of it, `{str: form}` for a mapping of any names to it, or a
# mapping with the names it must have; those that end with "?" may be missing, and names it does not know are free.
Form = type | UnionType | list | dict

BASE_MODEL_FORM = {"name": str | None, "revision": str | None, "config": {str: int | float | str | list | None}}
FISHER_FORM = {
    "damping": float,
    "input_of": {str: str},
    "shapes": {str: [int]},
    "base_model": BASE_MODEL_FORM,
    "seed": int,
    "rank?": int,
    "num_rows?": int,
    "max_length?": int | None,
    "fisher_type?": str | None,
    "dataset_fingerprint?": str,
    "versions?": {str: str},
}
DRIFT_FORM = {
    "layers": [str],
    "global_step": int | None,
    "budget_multiplier": float | None,
    "adapter_sha256": str | None,
    "summary": {"mean_relative_drift": float},
    "base_model?": BASE_MODEL_FORM,
    "fisher_energy?": float,
    "fisher?": {"damping": float, "num_tokens": int, "seed": int},
    "coefficients?": dict,
    "continued?": bool,
    "projected?": dict,
    "behaviour?": {
        "categories": [str],
        "judge?": {"name": str, "version": str},
        "decoding?": str,
        "kl_tokens?": int,
        "prompts_sha256?": str,
        "prompts?": dict,
    },
}
REFERENCE_FORM = {"scaling": {str: float}}

LAYER_NAME = re.compile(r"[\w.-]{1,300}")  # as in `model.layers.0.mlp.up_proj`: nothing that a path or a markup reads
SHA256 = re.compile(r"[0-9a-f]{64}")
LARGEST_INTEGER = 2**63
LARGEST_NUMBER = 1e300
STEEPEST_RISE = 1e-6  # relative; eigenvalues are stored in descending order
ORTHONORMAL_TOLERANCE = 0.05  # bfloat16 moves VᵀV by 0.01 at most
NEGATIVE_TOLERANCE = 1e-6  # of a squared norm that was rounded
WIDE_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_form(value: Any, form: Form, where: str = "") -> None:
    """
    Check a value out of JSON against a form.

    Raises:
        [`ArtifactError`]: The first thing that differs, such as `'damping' is 'a', not a float`: half a sentence.
    """
    if isinstance(form, list):
        if not isinstance(value, list):
            raise ArtifactError(f"'{where}' is {shown(value)}, not a list")
        for item in value:
            check_form(item, form[0], where)
    elif isinstance(form, dict):
        if not isinstance(value, dict):
            raise ArtifactError(f"'{where}' is {shown(value)}, not a mapping")
        if str in form:
            for item in value.values():
                check_form(item, form[str], where)
            return
        for key, inner in form.items():
            name = key.removesuffix("?")
            path = f"{where}.{name}".lstrip(".")
            if name in value:
                check_form(value[name], inner, path)
            elif name == key:
                raise ArtifactError(f"'{path}' is missing")
    elif not any(_is(value, kind) for kind in get_args(form) or (form,)):
        name = form.__name__ if isinstance(form, type) else str(form)
        raise ArtifactError(f"'{where}' is {shown(value)}, not {name} of sane size")


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:  # True is an int to Python, not to us
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and abs(value) <= LARGEST_NUMBER
    if kind is int:
        return isinstance(value, int) and abs(value) <= LARGEST_INTEGER
    return isinstance(value, kind)


def shown(value: Any) -> str:
    """A value of a file as it may stand in a sentence: on one line, and short."""
    text = repr(value) if not isinstance(value, int) or abs(value) <= LARGEST_INTEGER else "a huge number"
    return text if len(text) <= 60 else text[:57] + "…"


def check_names(names: Any) -> None:
    """
    Names of layers are different and plain.

    Raises:
        [`ArtifactError`]: Half a sentence, as all checks of this module.
    """
    names = list(names)
    if not names or len(set(names)) != len(names):
        raise ArtifactError(f"it names {len(names)} layers, of which {len(set(names))} differ")
    for name in names:
        if not LAYER_NAME.fullmatch(name):
            raise ArtifactError(f"{shown(name)} is no name of a layer")


def check_tensor_names(tensors: Mapping[str, Tensor], expected: set[str]) -> None:
    """Exactly the expected tensors are there."""
    for problem, names in (("is missing", expected - {*tensors}), ("does not belong there", {*tensors} - expected)):
        if names:
            raise ArtifactError(f"tensor {shown(min(names))} {problem}")


def check_numbers(tensor: Tensor, name: str, shape: tuple[int, ...], least: float | None = None) -> None:
    """Finite floating-point numbers of a shape, none below the least."""
    if tensor.dtype not in WIDE_FLOATS or tuple(tensor.shape) != shape:
        raise ArtifactError(
            f"{shown(name)} is {tensor.dtype} of shape {shown([*tensor.shape])}, not floats of {shape}"
        )
    if not torch.isfinite(tensor).all():
        raise ArtifactError(f"{shown(name)} is not finite")
    if least is not None and (tensor < least).any():
        raise ArtifactError(f"{shown(name)} is below {least:g}")


def check_fisher(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """
    Check tensors and metadata of Fisher statistics.

    Raises:
        [`ArtifactError`]: Half a sentence.
    """
    check_form(metadata, FISHER_FORM)
    input_of, shapes, damping = metadata["input_of"], metadata["shapes"], metadata["damping"]
    if not 0 <= damping <= 1:
        raise ArtifactError(f"'damping' is {shown(damping)}, not between 0 and 1")
    check_names(input_of)
    if {*shapes} != {*input_of}:
        raise ArtifactError("'shapes' and 'input_of' name other layers")
    for name, shape in shapes.items():
        if len(shape) != 2 or min(shape) < 1:
            raise ArtifactError(f"layer '{name}' has shape {shown(shape)}")
        first = input_of[name]
        if input_of.get(first) != first or shapes[first][1:] != shape[1:]:
            raise ArtifactError(f"layer '{name}' can't share the input of {shown(first)}")
    covariances = {f"inputs.{name}": shapes[name][1] for name in input_of.values()}
    if damping < 1:
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
        raise ArtifactError(f"'num_tokens' is no number of tokens but {count.dtype} of shape {shown([*count.shape])}")
    for prefix, dim in covariances.items():
        _check_covariance(
            LowRankCovariance(*(tensors[f"{prefix}.{part}"] for part in LowRankCovariance._fields)), prefix, dim
        )


def _check_covariance(covariance: LowRankCovariance, name: str, dim: int) -> None:
    shapes = [tuple(tensor.shape) for tensor in covariance]
    k = covariance.eigenvalues.numel()
    if shapes != [(dim, k), (k,), ()] or not 0 < k <= dim:
        raise ArtifactError(f"the tensors of '{name}' have shapes {shown(shapes)}, which do not fit dimension {dim}")
    check_numbers(covariance.eigenvectors, f"{name}.eigenvectors", (dim, k))
    check_numbers(covariance.eigenvalues, f"{name}.eigenvalues", (k,), least=0)
    check_numbers(covariance.remainder, f"{name}.remainder", (), least=0)
    if (covariance.eigenvalues.diff() > STEEPEST_RISE * covariance.eigenvalues[0]).any():
        raise ArtifactError(f"the eigenvalues of '{name}' do not descend")
    V = covariance.eigenvectors.float()
    if not ((V.mT @ V - torch.eye(k)).abs() <= ORTHONORMAL_TOLERANCE).all():
        raise ArtifactError(f"the eigenvectors of '{name}' are not orthonormal")


PER_LAYER = ("relative_drift", "alignment_energy", "task_energy", "overlap")
ANSWER_FLAGS = ("unsafe", "refused_base", "refused_tuned")
ANSWER_FIGURES = ("nll_base", "nll_tuned", "kl_first_tokens", "margin_base", "margin_tuned")  # NaN: not measured
HIDDEN_FIGURES = ("hidden_drift", "direction_cosine")
PER_PROMPT = (*ANSWER_FLAGS, *ANSWER_FIGURES, *HIDDEN_FIGURES)


def check_drift(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """
    Check tensors and metadata of a drift report.

    Raises:
        [`ArtifactError`]: Half a sentence.
    """
    check_form(metadata, DRIFT_FORM)
    layers, digest = metadata["layers"], metadata["adapter_sha256"]
    check_names(layers)
    for name in ("global_step", "budget_multiplier"):
        if metadata[name] is not None and metadata[name] < 0:
            raise ArtifactError(f"'{name}' is {shown(metadata[name])}, below 0")
    if digest is not None and not SHA256.fullmatch(digest):
        raise ArtifactError(f"'adapter_sha256' is {shown(digest)}")
    behaviour = metadata.get("behaviour")
    history = {name for name in tensors if name.startswith("history.")}
    check_tensor_names(tensors, {*PER_LAYER, *history, *(PER_PROMPT if behaviour is not None else ())})
    for name in PER_LAYER:
        check_numbers(tensors[name], name, (len(layers),), least=-NEGATIVE_TOLERANCE)
    if history:
        check_names(name.removeprefix("history.") for name in history)
        _check_alike("history", {name: tensors[name] for name in history}, None)
    if behaviour is not None:
        count = len(behaviour["categories"])
        if count == 0:
            raise ArtifactError("'behaviour' is of no prompt")
        for name in ANSWER_FLAGS:
            if tensors[name].dtype != torch.bool or tensors[name].shape != (count,):
                raise ArtifactError(f"'{name}' is {tensors[name].dtype} of shape {shown([*tensors[name].shape])}")
        _check_alike("answers", {name: tensors[name] for name in ANSWER_FIGURES}, count)
        _check_alike("hidden states", {name: tensors[name] for name in HIDDEN_FIGURES}, None)
        if tensors[HIDDEN_FIGURES[0]].numel() == 0:
            raise ArtifactError(f"'{HIDDEN_FIGURES[0]}' is empty")


def _check_alike(what: str, tensors: dict[str, Tensor], count: int | None) -> None:
    """Rows of floats, all as long as the first or as told; they may hold NaN where nothing was measured."""
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    wanted = [(count,)] if count is not None else [shape for shape in shapes if len(shape) == 1][:1]
    if not all(tensor.dtype in WIDE_FLOATS for tensor in tensors.values()) or [*shapes] != wanted:
        raise ArtifactError(f"the figures of the {what} have shapes {shown(sorted(shapes))} or are no floats")


def check_reference(tensors: dict[str, Tensor], metadata: dict[str, Any], shapes: dict[str, tuple[int, int]]) -> None:
    """
    Check tensors and metadata of the reference factors of layers of shapes `(d_out, d_in)`.

    Raises:
        [`ArtifactError`]: Half a sentence.
    """
    check_form(metadata, REFERENCE_FORM)
    for name, (d_out, d_in) in shapes.items():
        if name not in metadata["scaling"] or not {f"{name}.A", f"{name}.B"} <= {*tensors}:
            raise ArtifactError(f"layer '{name}' is not covered")
        rank = tensors[f"{name}.A"].shape[0] if tensors[f"{name}.A"].dim() else 0
        check_numbers(tensors[f"{name}.A"], f"{name}.A", (rank, d_in))
        check_numbers(tensors[f"{name}.B"], f"{name}.B", (d_out, rank))


def refuse(kind: str, path: Path, error: ArtifactError) -> ArtifactError:
    """The sentence for a file that failed a check of this module."""
    return ArtifactError(f"The {kind} in '{path}' are incomplete or malformed: {error}.")
