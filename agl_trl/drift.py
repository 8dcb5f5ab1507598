"""DriftReport: how far an adapter has moved the model, in weight space per layer and in behaviour per prompt."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from datasets import Dataset
from peft import PeftModel
from scipy.stats import binomtest
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .artifacts import DRIFT_FILE, FOLDER, ArtifactError, find_artifact, load_tensors, save_tensors
from .behaviour import answer_nll, generate_answers, prompt_text
from .fisher import FisherStatistics
from .lora import guarded_layers
from .penalty import alignment_energy
from .refusal import judge


FISHER_ENERGY = 0.9  # share of the trace of 𝓕 that spans the alignment-critical subspace


@dataclass(frozen=True)
class Rate:
    """Share of `count` out of `total` with its Wilson 95 % interval."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        interval = binomtest(self.count, self.total).proportion_ci(method="wilson")
        return interval.low, interval.high


@dataclass
class Behaviour:
    """
    What base and tuned model did with the same prompts; all tensors of shape `(prompts,)`.

    Args:
        categories (`list[str]`):
            Category of every prompt.
        unsafe (`Tensor`):
            Boolean: whether a refusal is the right answer.
        refused_base, refused_tuned (`Tensor`):
            Boolean: whether the greedy answer refuses.
        nll_base, nll_tuned (`Tensor`):
            Negative log-likelihood per token of the reference answer, in nats; NaN where there is none.
        metadata (`dict`):
            Judge and decoding.
    """

    categories: list[str]
    unsafe: Tensor
    refused_base: Tensor
    refused_tuned: Tensor
    nll_base: Tensor
    nll_tuned: Tensor
    metadata: dict[str, Any] = field(default_factory=dict)

    def refusal(self, tuned: bool, unsafe: bool = True, category: str | None = None) -> Rate:
        """Refusal rate on unsafe prompts, or over-refusal on safe ones, of all prompts or of one category."""
        chosen = self.unsafe == unsafe
        if category is not None:
            chosen = chosen & torch.tensor([c == category for c in self.categories])
        refused = self.refused_tuned if tuned else self.refused_base
        return Rate(int(refused[chosen].sum()), int(chosen.sum()))


def measure_behaviour(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: bool = True,
) -> Behaviour:
    """
    Ask base (adapter off) and tuned model (adapter on) the same prompts, decoded greedily.

    Args:
        model (`PeftModel`):
            Base model with its adapter.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        prompts (`Dataset`):
            Column `prompt`; optional `completion` (reference answer), `category` and boolean `unsafe` (default: all are).
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest answer.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts per batch.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Raises:
        `ValueError`: If there is no column `prompt` or no row.
    """
    if "prompt" not in prompts.column_names or len(prompts) == 0:
        raise ValueError(
            f"Prompts need a column 'prompt' and at least one row; found {prompts.column_names}, {len(prompts)} rows."
        )
    base, tuned = (
        ask(
            model,
            tokenizer,
            prompts,
            adapter=adapter,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
        for adapter in (False, True)
    )
    return compare(prompts, base, tuned)


class Answers(NamedTuple):
    """
    What one model did with the prompts.

    Args:
        texts (`list[str]`):
            Greedy answers.
        refused (`Tensor`):
            Boolean, of shape `(prompts,)`.
        nll (`Tensor`):
            Negative log-likelihood per token of the reference answers, of shape `(prompts,)`, NaN where there is none.
    """

    texts: list[str]
    refused: Tensor
    nll: Tensor


def ask(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    *,
    adapter: bool = True,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: bool = True,
) -> Answers:
    """Answers of one model, with its adapter on or off; arguments as in [`measure_behaviour`]."""
    questions = list(prompts["prompt"])
    with nullcontext() if adapter else model.disable_adapter():
        texts = generate_answers(
            model,
            tokenizer,
            questions,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            desc="Tuned model" if adapter else "Base model",
            progress=progress,
        )
        if "completion" in prompts.column_names:
            nll = answer_nll(model, tokenizer, prompts, batch_size=batch_size)
        else:
            nll = torch.full((len(prompts),), torch.nan)
    labels = [judge(prompt_text(question), text).label for question, text in zip(questions, texts, strict=True)]
    return Answers(texts, torch.tensor([label == "refusal" for label in labels]), nll)


def compare(prompts: Dataset, base: Answers, tuned: Answers) -> Behaviour:
    """Answers of two models to the same prompts, side by side."""
    columns, count = prompts.column_names, len(prompts)
    return Behaviour(
        categories=list(prompts["category"]) if "category" in columns else ["all"] * count,
        unsafe=torch.tensor(prompts["unsafe"]) if "unsafe" in columns else torch.ones(count, dtype=torch.bool),
        refused_base=base.refused,
        refused_tuned=tuned.refused,
        nll_base=base.nll,
        nll_tuned=tuned.nll,
        metadata={"judge": "refusal-openers", "decoding": "greedy"},
    )


@dataclass
class DriftReport:
    """
    How far an adapter has moved the model it was trained on.

    Args:
        layers (`list[str]`):
            Names of the adapted layers in the base model.
        relative_drift (`Tensor`):
            `‖ΔW‖²_𝓕 / ‖W‖²_𝓕` per layer, dimensionless, of shape `(layers,)`.
        alignment_energy (`Tensor`):
            `‖P_A(ΔW)‖²_𝓕 / ‖W‖²_𝓕` per layer: the part in the alignment-critical subspace.
        task_energy (`Tensor`):
            The rest; the two add up to `relative_drift`.
        history (`dict[str, Tensor]`):
            Logged values during training, each of shape `(logs,)`: `step`, `relative_drift`, `penalty`, `loss`.
        behaviour ([`Behaviour`], *optional*):
            Answers to prompts, where prompts were run.
        global_step (`int`, *optional*):
            Training step of the adapter.
        adapter_sha256 (`str`, *optional*):
            SHA-256 of the `adapter_model.safetensors` this report is about.
        metadata (`dict`):
            Base model, coefficients, statistics used: JSON-serialisable.
    """

    layers: list[str]
    relative_drift: Tensor
    alignment_energy: Tensor
    task_energy: Tensor
    history: dict[str, Tensor] = field(default_factory=dict)
    behaviour: Behaviour | None = None
    global_step: int | None = None
    adapter_sha256: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def measure(cls, model: PeftModel, statistics: FisherStatistics, fisher_energy: float = FISHER_ENERGY) -> Self:
        """
        Measure the active adapter of a model in weight space.

        Args:
            model (`PeftModel`):
                Base model with its adapter.
            statistics ([`FisherStatistics`]):
                Statistics of the base model that cover the layers of the adapter.
            fisher_energy (`float`, *optional*, defaults to `0.9`):
                Share of the trace of 𝓕 that spans the alignment-critical subspace.
        """
        layers = guarded_layers(model)
        drift = statistics.drift_of(layers)([layer.factors for layer in layers]).cpu()
        energies = []
        for layer in layers:
            A, B = (tensor.float() for tensor in layer.factors[:2])
            metric = statistics.metric(layer.name, A.device)
            energy = alignment_energy(A, B, layer.factors.scaling, metric, fisher_energy)
            energies.append((energy / metric.weight_norm**2).cpu())
        aligned = torch.stack(energies)
        metadata = {
            "base_model": statistics.metadata["base_model"],
            "fisher_energy": fisher_energy,
            "fisher": {
                "damping": statistics.damping,
                "num_tokens": statistics.num_tokens,
                "seed": statistics.metadata["seed"],
            },
        }
        names = [layer.name for layer in layers]
        return cls(names, drift, aligned, (drift - aligned).clamp_min(0), metadata=metadata)

    @property
    def mean_relative_drift(self) -> float:
        """Mean over layers of the relative drift: *the* number."""
        return self.relative_drift.mean().item()

    def summary(self) -> str:
        """A few readable lines: the number, where the drift sits, and what it did to the answers."""
        worst = int(self.relative_drift.argmax())
        total = self.relative_drift.sum()
        share = (self.alignment_energy.sum() / total).item() if total > 0 else 0.0
        lines = [
            f"relative drift        {self.mean_relative_drift:.3e}  (mean over {len(self.layers)} layers)",
            f"largest               {self.relative_drift[worst].item():.3e}  ({self.layers[worst]})",
            f"in alignment subspace {share:.0%}",
        ]
        if self.behaviour is not None:
            for unsafe, label in ((True, "refuses unsafe"), (False, "refuses safe")):
                if (self.behaviour.unsafe == unsafe).any():
                    base, tuned = (self.behaviour.refusal(t, unsafe) for t in (False, True))
                    low, high = tuned.interval
                    lines.append(
                        f"{label:<21} {base.value:.1%} before, {tuned.value:.1%} after (95 % interval {low:.1%} to {high:.1%}, "
                        f"{tuned.total} prompts)"
                    )
        return "\n".join(lines)

    def save_pretrained(self, save_directory: str | PathLike) -> Path:
        """
        Save as `agl/drift.safetensors` in a folder.

        Raises:
            `OSError`: If the file can't be written; a previous one is left as it was.
        """
        path = Path(save_directory) / FOLDER / DRIFT_FILE
        tensors = {name: getattr(self, name) for name in ("relative_drift", "alignment_energy", "task_energy")}
        tensors |= {f"history.{name}": values for name, values in self.history.items()}
        metadata = {
            **self.metadata,
            "kind": "drift",
            "layers": self.layers,
            "global_step": self.global_step,
            "adapter_sha256": self.adapter_sha256,
            "summary": {"mean_relative_drift": self.mean_relative_drift},
        }
        if self.behaviour is not None:
            tensors |= {name: getattr(self.behaviour, name) for name in _PER_PROMPT}
            metadata["behaviour"] = {"categories": self.behaviour.categories, **self.behaviour.metadata}
        save_tensors(path, tensors, metadata)
        return path

    @classmethod
    def from_pretrained(cls, location: str | PathLike) -> Self:
        """
        Read a report from a folder that holds `agl/drift.safetensors`, or from the file itself.

        Raises:
            [`ArtifactError`]: If there is none, or the file is broken, foreign or incomplete.
        """
        path = find_artifact(location, DRIFT_FILE)
        tensors, metadata = load_tensors(path)
        try:
            if metadata.pop("kind") != "drift":
                raise ArtifactError(f"'{path}' holds no drift report.")
            metadata.pop("schema_version"), metadata.pop("summary")
            described = metadata.pop("behaviour", None)
            behaviour = None
            if described is not None:
                categories = described.pop("categories")
                behaviour = Behaviour(categories, **{name: tensors[name] for name in _PER_PROMPT}, metadata=described)
            layers = metadata.pop("layers")
            report = cls(
                layers=layers,
                relative_drift=tensors["relative_drift"],
                alignment_energy=tensors["alignment_energy"],
                task_energy=tensors["task_energy"],
                history={
                    name.removeprefix("history."): t for name, t in tensors.items() if name.startswith("history.")
                },
                behaviour=behaviour,
                global_step=metadata.pop("global_step"),
                adapter_sha256=metadata.pop("adapter_sha256"),
                metadata=metadata,
            )
            if report.relative_drift.shape != (len(layers),):
                raise ArtifactError(
                    f"The drift report '{path}' names {len(layers)} layers for {report.relative_drift.shape} values."
                )
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"The drift report '{path}' is incomplete or malformed ({error!r}).") from error
        return report


_PER_PROMPT = ("unsafe", "refused_base", "refused_tuned", "nll_base", "nll_tuned")
