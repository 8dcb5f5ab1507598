"""What the file of a drift report must hold, checked value by value before anything is made of it."""

import re
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..artifacts.files import ArtifactError
from ..artifacts.schema import (
    LARGEST_INTEGER,
    WIDE_FLOATS,
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
from ..data.abilities import NAME as ABILITY_NAME
from ..data.abilities import AbilityKind
from ..objective.alignguard import TaskMetric, TaskSubspace


SHA256 = re.compile(r"[0-9a-f]{64}")
Count = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
BEHAVIOUR_NAME = re.compile(r"[\w-]{1,60}")
NEGATIVE_TOLERANCE = 1e-6  # of a squared norm that was rounded


class Summary(Metadata):
    """The number."""

    mean_relative_drift: Number | None = None


class FisherUsed(Metadata):
    """The statistics behind a report."""

    shrinkage: Number
    num_tokens: Integer
    seed: Integer


class JudgeUsed(Metadata):
    """The judge behind the verdicts."""

    name: str
    version: str


class SideCounts(Metadata):
    """Verdicts of one side."""

    uncertain: Integer
    cut_off: Integer
    while_reasoning: Integer


class VerdictCounts(Metadata):
    """Verdicts of both sides."""

    base: SideCounts
    tuned: SideCounts


class PromptsUsed(Metadata):
    """The prompts behind the answers."""

    name: str | None = None
    license: str | None = None
    count: Integer = 0


class KindUnasked(Metadata):
    """Prompts of one kind that were not asked, by what the base model did with them."""

    refused: Count
    answered: Count


class Unasked(Metadata):
    """Prompts that were not asked since the verdict was certain without them."""

    unsafe: KindUnasked
    safe: KindUnasked


class ServedSide(Metadata):
    """A model that a server was asked for."""

    model: str
    url: str
    at_length: Count


class ServedModels(Metadata):
    """Models that servers were asked for."""

    base: ServedSide
    tuned: ServedSide


class BehaviourMetadata(Metadata):
    """How the answers were made and judged."""

    categories: list[str]
    judge: JudgeUsed | None = None
    verdicts: VerdictCounts | None = None
    decoding: str = ""
    tokenizer_set_aside: str = ""
    kl_tokens: Integer = 0
    prompts_sha256: str = ""
    prompts: PromptsUsed | None = None
    unasked: Unasked | None = None
    served: ServedModels | None = None


class AbilityMetadata(Metadata):
    """A set of what both models can do, and how it was measured."""

    name: str
    kind: AbilityKind
    source: str = ""
    license: str = ""
    rows: Count = 0
    rows_of_set: Count = 0
    unmeasured: Count = 0
    scoring: str = ""
    rows_sha256: str = ""


class CoefficientsUsed(Metadata):
    """What was switched on in the run; early reports lack some of it."""

    __pydantic_extra__: dict[str, Integer | Number | str | bool | None]
    variant: str = "kfac"
    alignment: Number = 0.0
    task: Number = 0.0
    task_metric: TaskMetric = "rest"
    task_subspace: TaskSubspace = "complement"
    collision: Number = 0.0
    alpha: Number = 0.0
    beta: Number = 0.0
    threshold: Number = 0.0
    width: Number = 0.0
    rows: Integer | None = None
    fisher_energy: Number = 0.9
    kl_budget: Number | None = None
    drift_budget: Number | None = None
    anchor_coef: Number = 0.0
    fisher_coef: Number = 0.0
    trust_radius: Number | None = None
    anchor_every: Integer = 0


class ProjectionUsed(Metadata):
    """How an update was shrunk after training."""

    budget: Number
    drift_before: Number
    strength: Number = 0.0


class BehaviourKept(Metadata):
    """A protected behaviour and what was measured of it."""

    budget: Number | None = None
    kl: Number | None = None
    kl_first_tokens: Number | None = None
    rows: Integer = 0
    kinds: dict[str, Number] = Field(default_factory=dict)


class ProtectedUsed(Metadata):
    """What was held by its KL."""

    behaviours: dict[str, BehaviourKept]
    scale: Number | None = None
    share_per_drift: Number | None = None


class DriftMetadata(Metadata):
    """Metadata of a drift report."""

    layers: list[str]
    global_step: Integer | None
    budget_multiplier: Number | None
    adapter_sha256: str | None
    summary: Summary
    base_model: BaseModelDescription | None = None
    fisher_energy: Number = 0.9
    fisher: FisherUsed | None = None
    coefficients: CoefficientsUsed | None = None
    continued: bool = False
    uncovered: dict[str, Number] = Field(default_factory=dict)
    without_weights: str | None = None
    method: str | None = None
    projected: ProjectionUsed | None = None
    protected: ProtectedUsed | None = None
    behaviour: BehaviourMetadata | None = None
    abilities: list[AbilityMetadata] = Field(default_factory=list)


PER_LAYER = ("relative_drift", "alignment_energy", "task_energy", "overlap")
ANSWER_FLAGS = ("unsafe", "refused_base", "refused_tuned")
ANSWER_FIGURES = ("nll_base", "nll_tuned", "kl_first_tokens", "margin_base", "margin_tuned")  # NaN: not measured
HIDDEN_FIGURES = ("hidden_drift", "direction_cosine")
PER_PROMPT = (*ANSWER_FLAGS, *ANSWER_FIGURES, *HIDDEN_FIGURES)


def check_drift(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """
    Check tensors and metadata of a drift report, those of schema 1 brought to today's names.

    Raises:
        [`ArtifactError`]: Half a sentence.
    """
    if isinstance(used := metadata.get("fisher"), dict) and "damping" in used:  # of schema 1
        used["shrinkage"] = used.pop("damping")
    check_metadata(metadata, DriftMetadata)
    layers, digest = metadata["layers"], metadata["adapter_sha256"]
    if layers or metadata.get("without_weights") is None:
        check_names(layers)
        if metadata["summary"].get("mean_relative_drift") is None:
            raise ArtifactError("'summary.mean_relative_drift' is missing")
    elif "mean_relative_drift" in metadata["summary"]:
        raise ArtifactError("it has a mean drift, but of no layer")
    if uncovered := metadata.get("uncovered"):
        check_names(uncovered)
        if min(uncovered.values()) < 0:
            raise ArtifactError("a change in 'uncovered' is below 0")
    for name in ("global_step", "budget_multiplier"):
        if metadata[name] is not None and metadata[name] < 0:
            raise ArtifactError(f"'{name}' is {short_repr(metadata[name])}, below 0")
    for name, kept in (metadata.get("protected") or {"behaviours": {}})["behaviours"].items():
        for word in (name, *kept.get("kinds", {})):
            if not BEHAVIOUR_NAME.fullmatch(word):
                raise ArtifactError(f"{short_repr(word)} is no name of a behaviour")
    if digest is not None and not SHA256.fullmatch(digest):
        raise ArtifactError(f"'adapter_sha256' is {short_repr(digest)}")
    behaviour = metadata.get("behaviour")
    history = {name for name in tensors if name.startswith("history.")}
    per_layer = PER_LAYER if layers else ()
    of_abilities = _check_abilities(tensors, metadata.get("abilities", []))
    check_tensor_names(tensors, {*per_layer, *history, *of_abilities, *(PER_PROMPT if behaviour is not None else ())})
    for name in per_layer:
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
                raise ArtifactError(f"'{name}' is {tensors[name].dtype} of shape {short_repr([*tensors[name].shape])}")
        _check_alike("answers", {name: tensors[name] for name in ANSWER_FIGURES}, count)
        _check_alike("hidden states", {name: tensors[name] for name in HIDDEN_FIGURES}, None)
        if tensors[HIDDEN_FIGURES[0]].numel() == 0:
            raise ArtifactError(f"'{HIDDEN_FIGURES[0]}' is empty")


def ability_tensors(name: str, kind: str) -> dict[str, str]:
    """Tensors of a set in the file, each with the name of what it is in an [`Ability`]."""
    fields = ("base", "tuned", *(("raw_base", "raw_tuned") if kind == "multiple choice" else ()))
    return {f"ability.{name}.{field}": field for field in fields}


def _check_abilities(tensors: dict[str, Tensor], abilities: list[dict[str, Any]]) -> set[str]:
    """Sets with different plain names, whose tensors are of one length and, of texts, finite; the names of their tensors."""
    found: set[str] = set()
    for one in abilities:
        if not ABILITY_NAME.fullmatch(one["name"]):
            raise ArtifactError(f"{short_repr(one['name'])} is no name of an ability set")
        names = {*ability_tensors(one["name"], one["kind"])}
        if names & found:
            raise ArtifactError(f"the ability set {short_repr(one['name'])} is there twice")
        if missing := names - {*tensors}:
            raise ArtifactError(f"tensor {short_repr(min(missing))} is missing")
        found |= names
        count = tensors[min(names)].numel()
        if count == 0 and not one.get("unmeasured"):
            raise ArtifactError(f"the ability set {short_repr(one['name'])} is of no row")
        for name in sorted(names):
            if one["kind"] == "text":
                check_numbers(tensors[name], name, (count,), least=-NEGATIVE_TOLERANCE)
            elif tensors[name].dtype != torch.bool or tensors[name].shape != (count,):
                raise ArtifactError(f"'{name}' is {tensors[name].dtype} of shape {short_repr([*tensors[name].shape])}")
    return found


def _check_alike(what: str, tensors: dict[str, Tensor], count: int | None) -> None:
    """Rows of floats, all as long as the first or as told; they may hold NaN where nothing was measured."""
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    wanted = [(count,)] if count is not None else [shape for shape in shapes if len(shape) == 1][:1]
    if not all(tensor.dtype in WIDE_FLOATS for tensor in tensors.values()) or [*shapes] != wanted:
        raise ArtifactError(f"the figures of the {what} have shapes {short_repr(sorted(shapes))} or are no floats")
