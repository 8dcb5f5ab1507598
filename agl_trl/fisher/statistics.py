"""Fisher statistics of an aligned model: what they hold, the metric they define, and their file."""

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from accelerate.utils import align_module_device
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..artifacts.files import FISHER_FILE, FOLDER, REFERENCE_ANSWERS_FILE, ArtifactError, save_tensors
from ..artifacts.location import find_artifact, hub_id
from ..artifacts.schema import read_artifact, short_repr
from ..artifacts.upload import PushToHubMixin
from ..modeling.lora import AdaptedLayer, adapted_layers, base_weight, layer_shape
from ..objective.covariance import LowRankCovariance
from ..objective.quadratic_form import LayerMetric, RelativeDrift, dense_quadratic_form, grouped
from .schema import check_fisher


# What two configs must agree in for statistics to fit; other fields (dtype, cache, special tokens) change nothing.
STRUCTURAL_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
WEIGHT_NORM_TOLERANCE = 0.05  # a quantised base passes, another model does not


@dataclass
class FisherStatistics(PushToHubMixin):
    """
    Statistics of an aligned model, taken once at the reference weights: the K-FAC Fisher metric of every linear layer,

        𝓕 = G_δ ⊗ X,    G_δ = (1 − δ) · G / mean_eig(G) + δ · I,    ‖U‖²_𝓕 = tr(Uᵀ G_δ U X).

    Layers that read the same input (q, k, v; gate, up) share one X. Made by [`estimate_fisher`] or read by
    [`FisherStatistics.from_pretrained`].

    Args:
        inputs (`dict[str, LowRankCovariance]`):
            Input covariances X, by the name of the first layer that reads the input.
        outputs (`dict[str, LowRankCovariance]`):
            Output-gradient covariances G, by layer; empty for δ = 1.
        input_of (`dict[str, str]`):
            For every layer the name its input has in `inputs`.
        weight_norm (`dict[str, Tensor]`):
            `‖W‖_𝓕` of the frozen weight, by layer.
        num_tokens (`int`):
            Number of tokens behind the covariances.
        shrinkage (`float`):
            δ.
        metadata (`dict`):
            Base model, dataset, seed, versions: JSON-serialisable.
    """

    inputs: dict[str, LowRankCovariance]
    outputs: dict[str, LowRankCovariance]
    input_of: dict[str, str]
    weight_norm: dict[str, Tensor]
    num_tokens: int
    shrinkage: float
    metadata: dict[str, Any] = field(default_factory=dict)

    _told_by: ClassVar[tuple[str, ...]] = (REFERENCE_ANSWERS_FILE,)

    def metric(self, name: str, device: torch.device | str = "cpu") -> LayerMetric:
        """Metric of a layer, by its name in the base model, in float32."""
        return self.kept_metric(name).to(device, torch.float32)

    def kept_metric(self, name: str) -> LayerMetric:
        """Metric of a layer in the type it is kept in; layers that read the same input share its tensors."""
        G = self.outputs[name].shrunk(self.shrinkage) if self.outputs else None
        return LayerMetric(self.inputs[self.input_of[name]], G, self.weight_norm[name])

    @torch.no_grad()
    def weight_norms(self, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
        """`‖W‖_𝓕` of the frozen weights of these layers, by name; scalars on the CPU."""
        norms = {}
        for name, module in layers.items():
            with align_module_device(module):  # where it is offloaded
                weight = base_weight(module)
            norms[name] = dense_quadratic_form(weight, self.metric(name, weight.device)).sqrt().cpu()
            if not (torch.isfinite(norms[name]) and norms[name] > 0):
                raise ValueError(
                    f"Layer '{name}' has the weight norm {norms[name]:.3g} in the Fisher metric, so that its drift has no scale: "
                    "its weight or its input is zero or not finite; leave it out of `target_modules`."
                )
        return norms

    def drift_of(self, layers: list[AdaptedLayer]) -> RelativeDrift:
        """Batched relative drift of guarded layers, ready to be called with their factors at every step."""
        metrics = [self.kept_metric(layer.name) for layer in layers]
        return RelativeDrift(grouped(metrics, [layer.factors() for layer in layers]))

    def relative_drift(self, model: PreTrainedModel | PeftModel) -> dict[str, float]:
        """
        `‖ΔW‖²_𝓕 / ‖W‖²_𝓕` of every layer that the active adapter of a model adapts, by name. Their mean is *the* relative
        drift.
        """
        layers = adapted_layers(model)
        with torch.no_grad():
            drifts = self.drift_of(layers)([layer.factors() for layer in layers])
        return dict(zip((layer.name for layer in layers), drifts.tolist(), strict=True))

    def quadratic_form(self, model: PreTrainedModel | PeftModel) -> dict[str, float]:
        """`‖ΔW‖²_𝓕` of every layer that the active adapter of a model adapts, by name."""
        norms = self.weight_norm
        return {name: drift * norms[name].item() ** 2 for name, drift in self.relative_drift(model).items()}

    def save_pretrained(self, save_directory: str | PathLike) -> Path:
        """
        Save as `agl/fisher.safetensors` in a folder. The bytes depend on the statistics alone: no step, no adapter.

        Raises:
            `OSError`: If the file can't be written; a previous one is left as it was.
        """
        path = Path(save_directory) / FOLDER / FISHER_FILE
        tensors = {f"weight_norm.{name}": norm for name, norm in self.weight_norm.items()}
        tensors["num_tokens"] = torch.tensor(self.num_tokens)
        for side, covariances in (("inputs", self.inputs), ("outputs", self.outputs)):
            for name, covariance in covariances.items():
                tensors |= {f"{side}.{name}.{part}": tensor for part, tensor in covariance._asdict().items()}
        save_tensors(
            path, tensors, {**self.metadata, "shrinkage": self.shrinkage, "input_of": self.input_of, "kind": "fisher"}
        )
        return path

    @classmethod
    def from_pretrained(
        cls, location: str | PathLike, revision: str | None = None, token: str | bool | None = None
    ) -> Self:
        """
        Read statistics from a folder that holds `agl/fisher.safetensors`, from the file itself, or from a repo on the Hub.

        Args:
            location (`str` or `PathLike`):
                Folder, file, or id of a repo.
            revision (`str`, *optional*):
                Branch, tag or commit of the repo.
            token (`str` or `bool`, *optional*):
                Token for a private or gated repo; by default the one that is logged in.

        Raises:
            [`ArtifactError`]: If there are none, or the file is broken, foreign or incomplete.
        """
        path = find_artifact(location, FISHER_FILE, revision, token)
        tensors, metadata = read_artifact(path, "fisher", "Fisher statistics", check_fisher)
        input_of, shrinkage = metadata.pop("input_of"), metadata.pop("shrinkage")
        return cls(
            inputs={name: _covariance(tensors, f"inputs.{name}") for name in sorted(set(input_of.values()))},
            outputs={name: _covariance(tensors, f"outputs.{name}") for name in input_of} if shrinkage < 1 else {},
            input_of=input_of,
            weight_norm={name: tensors[f"weight_norm.{name}"] for name in input_of},
            num_tokens=int(tensors["num_tokens"]),
            shrinkage=shrinkage,
            metadata=metadata,
        )

    def check_fits(self, model: PreTrainedModel | PeftModel, layers: dict[str, nn.Module]) -> None:
        """
        Check that the statistics are of this base model and cover these layers.

        Args:
            model (`PreTrainedModel` or `PeftModel`):
                Model to be guarded.
            layers (`dict[str, Module]`):
                Layers by base name, of [`linear_layers`].

        Raises:
            [`ArtifactError`]: Naming the first thing that differs: a config value, a missing layer, a shape, or a weight
                whose norm differs by more than 5 %.
        """
        check_same_base(self.metadata["base_model"], model, "Fisher statistics")
        for name, module in layers.items():
            if name not in self.input_of:
                raise ArtifactError(self._uncovered(name, head=module is model.get_output_embeddings()))
            if tuple(self.metadata["shapes"][name]) != layer_shape(module):
                raise ArtifactError(
                    f"The Fisher statistics are of another base model: layer '{name}' has shape {self.metadata['shapes'][name]} "
                    f"there and {list(layer_shape(module))} here."
                )
        for name, norm in self.weight_norms(layers).items():
            if not abs(norm / self.weight_norm[name] - 1) <= WEIGHT_NORM_TOLERANCE:  # also where it is not a number
                raise ArtifactError(
                    f"The Fisher statistics are of other weights: the norm of layer '{name}' is {self.weight_norm[name]:.4g} there "
                    f"and {norm:.4g} here."
                )

    def _uncovered(self, name: str, *, head: bool) -> str:
        """Sentence for a layer that an adapter changes and the statistics do not cover."""
        if name in self.metadata.get("skipped_layers", ()):
            return (
                f"The Fisher statistics leave out '{name}', which the adapter changes, because it does not see every token of a "
                "text: leave it out of `target_modules`."
            )
        of_plain = ", as those of a plain model never do" if head else ""
        return (
            f"The Fisher statistics cover {len(self.input_of)} layers, but not {'the output head ' if head else ''}'{name}', which "
            f"the adapter changes{of_plain}: let them be taken for this adapter (`agl-trl drift` without `--fisher`, a trainer "
            "without `fisher_path`), or leave it out of `target_modules`."
        )


def check_same_base(described: dict[str, Any], model: PreTrainedModel | PeftModel, what: str) -> None:
    """
    Check that a file describes this base model.

    Args:
        described (`dict`):
            Its base model, as [`describe_base`] has it.
        model (`PreTrainedModel` or `PeftModel`):
            Model at hand.
        what (`str`):
            What the file holds, in words.

    Raises:
        [`ArtifactError`]: Naming the first config value that differs.
    """
    expected, found = described["config"], describe_base(model)["config"]
    for key in STRUCTURAL_KEYS:
        if expected.get(key) != found.get(key):
            raise ArtifactError(
                f"The {what} are of another base model: {key} is {_told(expected.get(key))} there and {found.get(key)} here."
            )


def _told(value: Any) -> str:
    return value if isinstance(value, str) and value.isidentifier() else short_repr(value)


def _covariance(tensors: dict[str, Tensor], prefix: str) -> LowRankCovariance:
    return LowRankCovariance(*(tensors[f"{prefix}.{part}"] for part in LowRankCovariance._fields))


def describe_base(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """
    Base model as it goes into the metadata: Hub id and revision where it came from the Hub (never a local path), and
    the structural part of its config.
    """
    config = model.config.get_text_config()
    name = model.config.name_or_path or None
    if name is not None and (Path(name).exists() or hub_id(name) is None):
        name = None  # a folder, which may be gone, or was named from another working directory
    structure = {key: getattr(config, key, None) for key in STRUCTURAL_KEYS}
    # transformers no longer keeps the commit on the config; the cache that the model came from does.
    cached = None if name is None else try_to_load_from_cache(name, "config.json")
    revision = Path(cached).parent.name if isinstance(cached, str) else None
    return {"name": name, "revision": revision, "config": structure}
