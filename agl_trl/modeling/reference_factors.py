"""Where a continued adapter started: its first tensors, kept with every save, so that a resumed run measures from there."""

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from ..artifacts.files import FOLDER, ArtifactError, load_tensors, save_tensors
from ..artifacts.schema import Metadata, Number, check_metadata, check_numbers, refuse
from ..objective.quadratic_form import LoraFactors
from .lora import AdaptedLayer, layer_shape


REFERENCE_FILE = "reference.safetensors"
BESIDE = "beside."  # in front of the name of a tensor that is trained beside LoRA


class ReferenceMetadata(Metadata):
    """Metadata of reference factors."""

    scaling: dict[str, Number]


def save_reference(folder: str | PathLike, layers: list[AdaptedLayer]) -> None:
    """
    Save the reference factors, and what is trained beside them, as `agl/reference.safetensors`; nothing for an adapter that
    started at ΔW = 0.
    """
    references = {layer.name: layer.reference for layer in layers if layer.reference is not None}
    if references:
        tensors = {f"{name}.{part}": getattr(f, part) for name, f in references.items() for part in ("A", "B")}
        tensors |= {BESIDE + t.name: t.reference for t in layers[0].beside if t.reference is not None}
        scalings = {name: factors.scaling for name, factors in references.items()}
        save_tensors(Path(folder) / FOLDER / REFERENCE_FILE, tensors, {"kind": "reference", "scaling": scalings})


def load_reference(folder: str | PathLike, layers: list[AdaptedLayer]) -> list[AdaptedLayer]:
    """
    Layers with the references saved in a folder; as they are where none were saved.

    Raises:
        [`ArtifactError`]: If the file is broken or of other layers.
    """
    path = Path(folder) / FOLDER / REFERENCE_FILE
    if not path.exists():
        return layers
    tensors, metadata = load_tensors(path)
    if metadata.get("kind") != "reference":
        raise ArtifactError(f"'{path}' holds no reference factors.")
    try:
        _check_reference(tensors, metadata, {layer.name: layer_shape(layer.module) for layer in layers})
        for tensor in layers[0].beside:
            if (key := BESIDE + tensor.name) not in tensors:
                raise ArtifactError(f"tensor '{tensor.name}', which the adapter trains beside LoRA, is not covered")
            check_numbers(tensors[key], key, tuple(tensor.parameter().shape))
    except ArtifactError as error:
        raise refuse("reference factors", path, error) from error
    scaling = metadata["scaling"]
    for tensor in layers[0].beside:
        tensor.reference = tensors[BESIDE + tensor.name]
    return [
        replace(layer, reference=LoraFactors(tensors[f"{n}.A"], tensors[f"{n}.B"], scaling[n]))
        for layer in layers
        for n in [layer.name]
    ]


def _check_reference(tensors: dict[str, Tensor], metadata: dict[str, Any], shapes: dict[str, tuple[int, int]]) -> None:
    """
    Check tensors and metadata of the reference factors of layers of shapes `(d_out, d_in)`.

    Raises:
        [`ArtifactError`]: Half a sentence.
    """
    check_metadata(metadata, ReferenceMetadata)
    for name, (d_out, d_in) in shapes.items():
        if name not in metadata["scaling"] or not {f"{name}.A", f"{name}.B"} <= {*tensors}:
            raise ArtifactError(f"layer '{name}' is not covered")
        rank = tensors[f"{name}.A"].shape[0] if tensors[f"{name}.A"].dim() else 0
        check_numbers(tensors[f"{name}.A"], f"{name}.A", (rank, d_in))
        check_numbers(tensors[f"{name}.B"], f"{name}.B", (d_out, rank))
