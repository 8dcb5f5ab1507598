"""What every file of ours shares: how it is read, and checks of its metadata against a pydantic model, names of layers, tensors."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from .files import ArtifactError, load_tensors


LAYER_NAME = re.compile(r"[\w.-]{1,300}")  # as in `model.layers.0.mlp.up_proj`: nothing that a path or a markup reads
LARGEST_INTEGER = 2**63
LARGEST_NUMBER = 1e300
WIDE_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Integer = Annotated[int, Field(ge=-LARGEST_INTEGER, le=LARGEST_INTEGER)]
Number = Annotated[float, Field(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]


class Metadata(BaseModel):
    """Metadata of a file: types as they are in JSON, without conversion; names that are not known are free."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class BaseModelDescription(Metadata):
    """The base model a file is of: Hub id and revision where it has them, and the structural part of its config."""

    name: str | None
    revision: str | None
    config: dict[str, Integer | Number | str | list | None]


def check_metadata(metadata: dict[str, Any], schema: type[Metadata]) -> None:
    """
    Check metadata out of JSON against a schema.

    Raises:
        [`ArtifactError`]: The first thing that differs, such as `'seed' is 'a', not a valid integer`: half a sentence.
    """
    try:
        schema.model_validate(metadata)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = short_repr(".".join(str(part) for part in first["loc"]))
        if first["type"] == "missing":
            raise ArtifactError(f"{where} is missing") from error
        bounds = ("greater_than_equal", "less_than_equal")
        reason = (
            "of sane size" if first["type"] in bounds else first["msg"].removeprefix("Input should be ").rstrip(".")
        )
        raise ArtifactError(f"{where} is {short_repr(first['input'])}, not {reason}") from error


def short_repr(value: Any) -> str:
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
            raise ArtifactError(f"{short_repr(name)} is no name of a layer")


def check_tensor_names(tensors: Mapping[str, Tensor], expected: set[str]) -> None:
    """Exactly the expected tensors are there."""
    for problem, names in (("is missing", expected - {*tensors}), ("does not belong there", {*tensors} - expected)):
        if names:
            raise ArtifactError(f"tensor {short_repr(min(names))} {problem}")


def check_numbers(tensor: Tensor, name: str, shape: tuple[int, ...], least: float | None = None) -> None:
    """Finite floating-point numbers of a shape, none below the least."""
    if tensor.dtype not in WIDE_FLOATS or tuple(tensor.shape) != shape:
        raise ArtifactError(
            f"{short_repr(name)} is {tensor.dtype} of shape {short_repr([*tensor.shape])}, not floats of {shape}"
        )
    if not torch.isfinite(tensor).all():
        raise ArtifactError(f"{short_repr(name)} is not finite")
    if least is not None and (tensor < least).any():
        raise ArtifactError(f"{short_repr(name)} is below {least:g}")


def refuse(what: str, path: Path, error: ArtifactError) -> ArtifactError:
    """The sentence for a file that failed a check of this module."""
    return ArtifactError(f"The {what} in '{path}' can't be used, incomplete or malformed: {error}.")


def read_artifact(
    path: Path, kind: str, what: str, check: Callable[[dict[str, Tensor], dict[str, Any]], None]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """
    Tensors and metadata of a file of one kind, read and checked; its kind and schema version are left out.

    Args:
        path (`Path`):
            File.
        kind (`str`):
            Its kind, as in the metadata.
        what (`str`):
            What it holds, in words.
        check (`Callable`):
            Called with tensors and metadata, which it may bring from an early schema to today's; raises half a sentence.

    Raises:
        [`ArtifactError`]: If the file is missing, broken, of another kind, or does not pass the check.
    """
    tensors, metadata = load_tensors(path)
    if metadata.pop("kind", None) != kind:
        raise ArtifactError(f"'{path}' holds no {what}.")
    try:
        check(tensors, metadata)
    except ArtifactError as error:
        raise refuse(what, path, error) from error
    metadata.pop("schema_version")
    return tensors, metadata
