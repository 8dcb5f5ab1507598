"""DriftReport: how far an adapter has moved the model, in weight space per layer and in behaviour per prompt."""

from dataclasses import dataclass, field
from math import nan
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..artifacts.files import ADAPTER_FILE, DRIFT_FILE, FOLDER, PICTURE_FILE, ArtifactError, save_tensors, sha256
from ..artifacts.location import find_artifact
from ..artifacts.schema import read_artifact
from ..artifacts.upload import PushError, PushToHubMixin
from ..evaluation.abilities import Ability
from ..evaluation.behaviour import Behaviour
from ..evaluation.summary import ability_lines, behaviour_lines
from ..fisher.statistics import FisherStatistics, describe_base
from ..modeling.lora import AdaptedLayer, active_adapter, with_factors
from ..modeling.tuned_layers import no_weights
from .by_layer import LayerDrifts, adapter_drifts, checkpoint_drifts, factored_drifts
from .parts import mean_of_moved
from .protected import protected_lines
from .schema import PER_LAYER, PER_PROMPT, ability_tensors, check_drift


FISHER_ENERGY = 0.9  # share of the trace of 𝓕 that spans the alignment-critical subspace


@dataclass
class DriftReport(PushToHubMixin):
    """
    How far an adapter has moved the model it was trained on.

    Args:
        layers (`list[str]`):
            Names of the adapted layers in the base model; none where the update has no drift of weights, as of prompt tuning.
        relative_drift (`Tensor`):
            `‖ΔW‖²_𝓕 / ‖W‖²_𝓕` per layer, dimensionless, of shape `(layers,)`.
        alignment_energy (`Tensor`):
            `‖P_A(ΔW)‖²_𝓕 / ‖W‖²_𝓕` per layer: the part in the alignment-critical subspace.
        task_energy (`Tensor`):
            The rest; the two add up to `relative_drift`.
        overlap (`Tensor`):
            Riemannian overlap of the two parts (its default β, τ and T), from at most 256 evenly spaced rows of every layer.
        history (`dict[str, Tensor]`):
            Logged values during training, each of shape `(logs,)`: `step`, `relative_drift`, `penalty`, `loss`.
        behaviour ([`Behaviour`], *optional*):
            Answers to prompts, where prompts were run.
        global_step (`int`, *optional*):
            Training step of the adapter.
        budget_multiplier (`float`, *optional*):
            Multiplier of the drift budget at that step, from which a resumed run goes on.
        adapter_sha256 (`str`, *optional*):
            SHA-256 of the `adapter_model.safetensors` this report is about.
        metadata (`dict`):
            Base model, coefficients, statistics used, tensors that changed and are no part of the drift: JSON-serialisable.
        abilities (`list[Ability]`):
            What both models can do, set by set, where sets were measured.
    """

    layers: list[str]
    relative_drift: Tensor
    alignment_energy: Tensor
    task_energy: Tensor
    overlap: Tensor
    history: dict[str, Tensor] = field(default_factory=dict)
    behaviour: Behaviour | None = None
    global_step: int | None = None
    budget_multiplier: float | None = None
    adapter_sha256: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    abilities: list[Ability] = field(default_factory=list)

    _told_by: ClassVar[tuple[str, ...]] = (PICTURE_FILE,)

    @classmethod
    @torch.no_grad()
    def measure(
        cls,
        model: PeftModel,
        statistics: FisherStatistics | None,
        fisher_energy: float = FISHER_ENERGY,
        layers: list[AdaptedLayer] | None = None,
    ) -> Self:
        """
        Measure the active adapter of a model in weight space: one of LoRA by its factors, one of another method by the ΔW that
        its layers have. Where no layer has one, the report has no figure of the weights, and says why.

        Args:
            model (`PeftModel`):
                Base model with its adapter.
            statistics ([`FisherStatistics`], *optional*):
                Statistics of the base model that cover the layers of the adapter; `None` where it changes no linear layer.
            fisher_energy (`float`, *optional*, defaults to `0.9`):
                Share of the trace of 𝓕 that spans the alignment-critical subspace.
            layers (`list[AdaptedLayer]`, *optional*):
                Layers with the factors they are measured from; by default those of the active adapter, from ΔW = 0.
        """
        layers = with_factors(model) if layers is None else layers
        if layers and statistics is not None:
            return cls._of(factored_drifts(layers, statistics, fisher_energy), statistics, fisher_energy)
        drifts, adapter = adapter_drifts(model, statistics, fisher_energy), active_adapter(model)
        if statistics is not None and drifts.names:
            report = cls._of(drifts, statistics, fisher_energy)
        else:
            metadata = {
                "base_model": describe_base(model),
                "without_weights": no_weights(model, adapter),
                "uncovered": drifts.uncovered,
            }
            none = torch.empty(0)
            report = cls([], none, none, none, none, metadata=metadata)
        report.metadata["method"] = model.peft_config[adapter].peft_type.value
        return report

    @classmethod
    @torch.no_grad()
    def measure_checkpoint(
        cls,
        base: PreTrainedModel,
        tuned: PreTrainedModel,
        statistics: FisherStatistics,
        fisher_energy: float = FISHER_ENERGY,
    ) -> Self:
        """
        Measure a checkpoint of its own (a merged adapter, a full fine-tuning) against its base, over the linear layers that
        the statistics cover; arguments as in [`measure`]. A layer whose weight is the base's, or that rounded to another type,
        has a drift of exactly 0 and is no part of the mean: so a merged adapter has the number that it had as an adapter.

        Raises:
            `ValueError`: If a layer has another shape in the tuned model or is not there, or the statistics cover none.
        """
        return cls._of(checkpoint_drifts(base, tuned, statistics, fisher_energy), statistics, fisher_energy)

    @classmethod
    def _of(cls, drifts: LayerDrifts, statistics: FisherStatistics, fisher_energy: float) -> Self:
        names, drift, alignment, overlap, uncovered = drifts
        metadata = {
            "base_model": statistics.metadata["base_model"],
            "fisher_energy": fisher_energy,
            "fisher": {
                "shrinkage": statistics.shrinkage,
                "num_tokens": statistics.num_tokens,
                "seed": statistics.metadata["seed"],
            },
            "uncovered": uncovered,
        }
        return cls(names, drift, alignment, (drift - alignment).clamp_min(0), overlap, metadata=metadata)

    @property
    def mean_relative_drift(self) -> float:
        """
        Mean of the relative drift over the layers that moved: *the* number, the same for an adapter and its merged copy. NaN
        where there is none.
        """
        return mean_of_moved(self.relative_drift).item() if self.layers else nan

    @property
    def num_moved(self) -> int:
        """Number of layers that moved."""
        return int((self.relative_drift > 0).sum())

    @property
    def method(self) -> str:
        """PEFT's name of the method, such as `"LOHA"`; reports of LoRA measured by its factors do not name it."""
        return self.metadata.get("method", "LORA")

    @property
    def without_weights(self) -> str | None:
        """Why the report has no figure of the weights, half a sentence; `None` where it has."""
        return self.metadata.get("without_weights")

    @property
    def uncovered(self) -> dict[str, float]:
        """
        Tensors that changed and are in none of the drift figures, by name in the base model, each with the norm of its change
        over its own: what an adapter trains beside LoRA, or of a checkpoint what the statistics do not cover. Answers and KL
        include them.
        """
        return self.metadata.get("uncovered", {})

    def _scope(self) -> str:
        moved, count = self.num_moved, len(self.layers)
        return (
            f"mean over {count} layers" if moved in (0, count) else f"mean over {moved} layers that moved, of {count}"
        )

    def summary(self) -> str:
        """A few readable lines: the number, where the drift sits, and what it did to the answers."""
        lines = [f"relative drift        not measured: {self.without_weights}"]
        if self.layers:
            worst = int(self.relative_drift.argmax())
            total = self.relative_drift.sum()
            share = (self.alignment_energy.sum() / total).item() if total > 0 else 0.0
            lines = [
                f"relative drift        {self.mean_relative_drift:.3e}  ({self._scope()})",
                f"largest               {self.relative_drift[worst].item():.3e}  ({self.layers[worst]})",
                f"in alignment subspace {share:.0%}",
            ]
        if self.uncovered:
            farthest = max(self.uncovered, key=self.uncovered.__getitem__)
            lines.append(
                f"not in these figures  {len(self.uncovered)} changed tensors, most of all {farthest} "
                f"(by {self.uncovered[farthest]:.1e} of its norm)"
            )
        if (protected := self.metadata.get("protected")) is not None:
            lines += protected_lines(protected)
        if self.behaviour is not None:
            lines += behaviour_lines(self.behaviour)
        lines += ability_lines(self.abilities)
        return "\n".join(lines)

    def save_pretrained(self, save_directory: str | PathLike) -> Path:
        """
        Save as `agl/drift.safetensors` in a folder.

        Raises:
            `ValueError`: If the drift is not finite.
            `OSError`: If the file can't be written; a previous one is left as it was.
        """
        path = Path(save_directory) / FOLDER / DRIFT_FILE
        if not torch.isfinite(self.relative_drift).all():
            raise ValueError("The run has diverged: the relative drift is not finite. Lower the learning rate.")
        tensors = {name: getattr(self, name) for name in PER_LAYER} if self.layers else {}
        tensors |= {f"history.{name}": values for name, values in self.history.items()}
        metadata = {
            **self.metadata,
            "kind": "drift",
            "layers": self.layers,
            "global_step": self.global_step,
            "budget_multiplier": self.budget_multiplier,
            "adapter_sha256": self.adapter_sha256,
            "summary": {"mean_relative_drift": self.mean_relative_drift} if self.layers else {},
        }
        if self.behaviour is not None:
            tensors |= {name: getattr(self.behaviour, name) for name in PER_PROMPT}
            metadata["behaviour"] = {"categories": self.behaviour.categories, **self.behaviour.metadata}
        if self.abilities:
            named = [(one, ability_tensors(one.name, one.kind)) for one in self.abilities]
            tensors |= {name: getattr(one, field) for one, names in named for name, field in names.items()}
            metadata["abilities"] = [{"name": one.name, "kind": one.kind, **one.metadata} for one in self.abilities]
        save_tensors(path, tensors, metadata)
        return path

    def _check_repo(self, sha256_there: dict[str, str]) -> None:
        found = sha256_there.get(ADAPTER_FILE)
        if found and self.adapter_sha256 is not None and found != self.adapter_sha256:
            raise PushError(
                f"The report is of another adapter than the repo's (sha256 {self.adapter_sha256[:8]}… and {found[:8]}…): push both "
                "with `agl-trl push`, or measure the repo's with `agl-trl attach`."
            )

    @classmethod
    def from_pretrained(
        cls, location: str | PathLike, revision: str | None = None, token: str | bool | None = None
    ) -> Self:
        """
        Read a report from a folder that holds `agl/drift.safetensors`, from the file itself, or from a repo on the Hub.

        Args:
            location (`str` or `PathLike`):
                Folder, file, or id of a repo.
            revision (`str`, *optional*):
                Branch, tag or commit of the repo.
            token (`str` or `bool`, *optional*):
                Token for a private or gated repo; by default the one that is logged in.

        Raises:
            [`ArtifactError`]: If there is none, or the file is broken, foreign or incomplete.
        """
        path = find_artifact(location, DRIFT_FILE, revision, token)
        tensors, metadata = read_artifact(path, "drift", "drift report", check_drift)
        metadata.pop("summary")
        described = metadata.pop("behaviour", None)
        behaviour = None
        if described is not None:
            values: dict[str, Any] = {name: tensors[name] for name in PER_PROMPT}
            behaviour = Behaviour(described.pop("categories"), **values, metadata=described)
        abilities = []
        for one in metadata.pop("abilities", []):
            name, kind = one.pop("name"), one.pop("kind")
            found: dict[str, Any] = {field: tensors[tensor] for tensor, field in ability_tensors(name, kind).items()}
            abilities.append(Ability(name, kind, **found, metadata=one))
        layers = metadata.pop("layers")
        return cls(
            layers=layers,
            **{name: tensors[name] if layers else torch.empty(0) for name in PER_LAYER},
            history={name.removeprefix("history."): t for name, t in tensors.items() if name.startswith("history.")},
            behaviour=behaviour,
            global_step=metadata.pop("global_step"),
            budget_multiplier=metadata.pop("budget_multiplier"),
            adapter_sha256=metadata.pop("adapter_sha256"),
            metadata=metadata,
            abilities=abilities,
        )

    def check_describes(self, adapter: str | PathLike) -> None:
        """
        Check that this report is of an adapter.

        Args:
            adapter (`str` or `PathLike`): Its folder, or its `adapter_model.safetensors`.

        Raises:
            [`ArtifactError`]: If it is of another one, or does not say of which.
        """
        path = Path(adapter) / ADAPTER_FILE if Path(adapter).is_dir() else Path(adapter)
        if self.adapter_sha256 is None or not path.is_file():
            missing = "the report names no sha256" if path.is_file() else "there is no such file"
            raise ArtifactError(f"Can't tell whether the report is of the adapter '{path}': {missing}.")
        found = sha256(path)
        if found != self.adapter_sha256:
            step = "" if self.global_step is None else f" (step {self.global_step})"
            raise ArtifactError(
                f"The report is of another adapter: its sha256 starts with {self.adapter_sha256[:12]}{step}, that of "
                f"'{path}' with {found[:12]}."
            )
