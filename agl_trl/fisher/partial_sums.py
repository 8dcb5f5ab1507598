"""A statistics pass that was interrupted goes on where it stopped, and ends with the same bytes."""

import hashlib
import logging
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..artifacts.files import FOLDER, ArtifactError, load_tensors, save_tensors
from ..objective.covariance import CovarianceSketch


PARTIAL_FILE = "_partial.safetensors"  # never pushed: the name begins with an underscore
SAVE_EVERY = 60.0  # seconds
SAMPLED = 256  # numbers of every weight
logger = logging.getLogger(__name__)


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over some numbers of every weight: two models of one config, type and quantisation differ in it."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        with align_module_device(module):  # where it is offloaded
            for part, parameter in module.named_parameters(recurse=False):
                sample = parameter.data.flatten()[:: max(1, parameter.numel() // SAMPLED)].contiguous().cpu()
                digest.update(repr((name, part, str(parameter.dtype), list(parameter.shape))).encode())
                digest.update(sample.view(torch.uint8).numpy().data)
    return digest.hexdigest()


class PartialSums:
    """
    The sums of a statistics pass on disk, written now and then, removed at the end.

    Args:
        output_dir (`Path`):
            Folder that will receive the statistics.
        key (`dict`):
            What the sums depend on; sums saved under another key are not used.
    """

    def __init__(self, output_dir: Path, key: dict[str, Any]):
        self.path, self.key = Path(output_dir) / FOLDER / PARTIAL_FILE, key
        self._saved = time.monotonic()

    def load(self) -> tuple[int, dict[str, str], dict[str, dict[str, dict[str, Tensor]]]]:
        """Batches done, `input_of`, and the sums by side, layer and part; without a pass to go on with `(0, {}, {})`."""
        if not self.path.is_file():
            return 0, {}, {}
        try:
            tensors, metadata = load_tensors(self.path)
        except ArtifactError as error:
            logger.warning(f"The pass starts anew: {error}")
            return 0, {}, {}
        if metadata.get("kind") != "partial" or metadata.get("key") != self.key:
            logger.warning(f"The pass starts anew: '{self.path}' is of another model, other rows or other settings.")
            return 0, {}, {}
        sums: dict[str, dict[str, dict[str, Tensor]]] = {"inputs": {}, "outputs": {}}
        for name, tensor in tensors.items():
            side, rest = name.split("/", 1)
            layer, part = rest.rsplit("/", 1)
            sums[side].setdefault(layer, {})[part] = tensor
        return metadata["done"], metadata["input_of"], sums

    def save(
        self,
        done: int,
        input_of: dict[str, str],
        inputs: dict[str, CovarianceSketch],
        outputs: dict[str, CovarianceSketch],
    ) -> None:
        """Save after a batch, if the last save is long enough ago."""
        if time.monotonic() - self._saved < SAVE_EVERY:
            return
        tensors = {
            f"{side}/{name}/{part}": getattr(sketch, part)
            for side, sketches in (("inputs", inputs), ("outputs", outputs))
            for name, sketch in sketches.items()
            for part in ("sums", "trace", "count")
        }
        save_tensors(self.path, tensors, {"kind": "partial", "key": self.key, "done": done, "input_of": input_of})
        self._saved = time.monotonic()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
