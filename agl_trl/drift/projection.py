"""Projecting an adapter after the fact: shrink a trained update to a drift budget, without data and without training."""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..artifacts.files import ADAPTER_FILE, FOLDER, ArtifactError, write_atomically
from ..fisher.statistics import FisherStatistics
from ..modeling.lora import AdaptedLayer, adapted_layers
from ..objective.covariance import LowRankCovariance
from .parts import mean_of_moved


STRONGEST = 1e30  # ν beyond which nothing changes any more


def projected_factor(A: Tensor, X: LowRankCovariance, strength: float) -> Tensor:
    """
    `A (I + ν X/λ̄)⁻¹`, with λ̄ the mean eigenvalue of X: the update `B A′` nearest to `B A` under a penalty ν on
    `‖ΔW‖²_𝓕`, which takes most from the directions that the protected inputs use most, and keeps the rank.

    Args:
        A (`Tensor`):
            `lora_A` weight, of shape `(r, d_in)`.
        X (`LowRankCovariance`):
            Input covariance of the layer.
        strength (`float`):
            ν, at least 0.
    """
    mean = X.trace() / X.dim
    rest = 1 / (1 + strength * X.remainder / mean)
    inside = 1 / (1 + strength * X.eigenvalues / mean)
    V = X.eigenvectors
    return rest * A + ((A @ V) * (inside - rest)) @ V.mT


@torch.no_grad()
def strength_for(
    layers: list[AdaptedLayer],
    statistics: FisherStatistics,
    budget: float,
    dtypes: Sequence[torch.dtype] | None = None,
) -> tuple[float, list[Tensor]]:
    """
    The smallest ν (to 0.1 %) at which the mean relative drift is at or below a budget, and the `lora_A` weights there.

    Args:
        layers (`list[AdaptedLayer]`):
            Layers of the adapter.
        statistics ([`FisherStatistics`]):
            Statistics of its base model.
        budget (`float`):
            Largest mean relative drift.
        dtypes (`Sequence[torch.dtype]`, *optional*):
            Types that the `lora_A` weights will be stored in, by layer; by default float32. The weights are rounded to them
            before they are measured: it is the stored ones that keep the budget.

    Returns:
        `tuple[float, list[Tensor]]`: ν, and a weight per layer in its type.

    Raises:
        `ValueError`: If the statistics use the output side, for which no such shrinking keeps the rank, or the budget is
            not above 0, or so small that what rounding leaves is above it.
    """
    if budget <= 0:
        raise ValueError(f"The budget must be above 0, got {budget}.")
    if statistics.shrinkage < 1:
        raise ValueError("Projection needs statistics of the input side alone: estimate them with shrinkage 1.")
    drift = statistics.drift_of(layers)
    current = [layer.current() for layer in layers]
    metrics = [statistics.metric(layer.name, A.device).input for layer, (A, _, _) in zip(layers, current, strict=True)]
    dtypes = [torch.float32] * len(layers) if dtypes is None else dtypes

    def at(strength: float) -> tuple[float, list[Tensor]]:
        As = [
            projected_factor(factors.A.float(), X, strength).to(dtype)
            for factors, X, dtype in zip(current, metrics, dtypes, strict=True)
        ]
        factors = [one._replace(A=A) for one, A in zip(current, As, strict=True)]
        return mean_of_moved(drift(factors)).item(), As

    value, As = at(0.0)
    if value <= budget:
        return 0.0, As
    low, high = 0.0, 1e-6
    while at(high)[0] > budget:
        low, high = high, 4 * high
        if high > STRONGEST:
            raise ValueError(f"No projection keeps a budget of {budget:g}: rounding of the weights alone is above it.")
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[0] > budget else (low, middle)
    return high, at(high)[1]


@torch.no_grad()
def write_projected(
    source: Path, target: Path, model: PeftModel, statistics: FisherStatistics, budget: float
) -> float:
    """
    Shrink an adapter to a drift budget: a copy of its folder, without the evidence of the original, and the model, which
    then holds the very weights of the copy.

    Args:
        source (`Path`):
            Folder of the adapter.
        target (`Path`):
            Folder of the copy.
        model (`PeftModel`):
            Base model with the adapter, loaded from `source`.
        statistics ([`FisherStatistics`]):
            Statistics of its base model.
        budget (`float`):
            Largest mean relative drift.

    Returns:
        `float`: ν of [`strength_for`].

    Raises:
        `ValueError`: As in [`strength_for`].
        [`ArtifactError`]: If the copy would overwrite the original.
        `OSError`: If the copy can't be written.
    """
    if target.resolve() == source.resolve():
        raise ArtifactError(f"The projected copy must not overwrite '{source}': name another `--output-dir`.")
    layers = adapted_layers(model)
    with safe_open(source / ADAPTER_FILE, "pt") as file:
        stored, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    dtypes = {name: tensor.dtype for name, tensor in stored.items()}
    (usual, _), *_ = Counter(dtypes.values()).most_common(1)  # of a file with names that PEFT has changed since
    names = [f"base_model.model.{layer.name}.lora_A.weight" for layer in layers]
    strength, As = strength_for(layers, statistics, budget, [dtypes.get(name, usual) for name in names])
    for layer, A in zip(layers, As, strict=True):
        layer.parameters()[0].data.copy_(A)
    # As PEFT names them today, and without the base's own tensors, which loading has found to be the base's.
    tensors = get_peft_model_state_dict(model, adapter_name=layers[0].adapter, save_embedding_layers=False)
    tensors = {
        name: stored[name]
        if name in stored and name not in names
        else tensor.cpu().to(dtypes.get(name, usual)).contiguous()
        for name, tensor in tensors.items()
    }
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copy2(path, target / path.name)
    shutil.rmtree(target / FOLDER, ignore_errors=True)
    write_atomically(target / ADAPTER_FILE, save(tensors, metadata))
    return strength
