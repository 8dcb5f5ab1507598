"""Where a continued adapter started: its first factors, kept with every save, so that a resumed run measures from there."""

from dataclasses import replace
from os import PathLike
from pathlib import Path

from .artifacts import FOLDER, ArtifactError, load_tensors, save_tensors
from .forms import check_reference, refuse
from .lora import GuardedLayer, layer_shape
from .penalty import LoraFactors


REFERENCE_FILE = "reference.safetensors"


def save_reference(folder: str | PathLike, layers: list[GuardedLayer]) -> None:
    """Save the reference factors as `agl/reference.safetensors`; nothing for an adapter that started at ΔW = 0."""
    references = {layer.name: layer.reference for layer in layers if layer.reference is not None}
    if references:
        tensors = {f"{name}.{part}": getattr(f, part) for name, f in references.items() for part in ("A", "B")}
        scalings = {name: factors.scaling for name, factors in references.items()}
        save_tensors(Path(folder) / FOLDER / REFERENCE_FILE, tensors, {"kind": "reference", "scaling": scalings})


def load_reference(folder: str | PathLike, layers: list[GuardedLayer]) -> list[GuardedLayer]:
    """
    Layers with the reference factors saved in a folder; as they are where none were saved.

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
        check_reference(tensors, metadata, {layer.name: layer_shape(layer.module) for layer in layers})
    except ArtifactError as error:
        raise refuse("reference factors", path, error) from error
    scaling = metadata["scaling"]
    return [
        replace(layer, reference=LoraFactors(tensors[f"{n}.A"], tensors[f"{n}.B"], scaling[n]))
        for layer in layers
        for n in [layer.name]
    ]
