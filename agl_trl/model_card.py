"""Model cards: what an adapter is, how far it moved, and what was asked of it."""

from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import Environment, StrictUndefined

from .artifacts import write_atomically
from .drift import DriftReport
from .objective import Coefficients


# TRL's card from here on (run links, versions, citations) is kept; what it says before, our templates say.
KEPT_FROM = "## Training procedure"
CITATION = """Cite AlignGuard-LoRA as:

```bibtex
@article{alignguard-lora,
    title         = {AlignGuard-LoRA: Alignment-Preserving Fine-Tuning via Fisher-Guided Decomposition and Riemannian-Geodesic Collision Regularization},
    author        = {Das, Amitava and Borah, Abhilekh and Jain, Vinija and Chadha, Aman},
    year          = {2025},
    eprint        = {2508.02079},
    archivePrefix = {arXiv}
}
```"""


def _render(template: str, **values: Any) -> str:
    text = files("agl_trl.model_cards").joinpath(template).read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    return environment.from_string(text).render(**values)


def describe_settings(settings: dict[str, Any]) -> str:
    """The objective of a run in words, from the coefficients in its report."""
    if settings.get("variant") == "paper":
        return "the objective as published, as far as it is known"
    coefficients = Coefficients(**{field.name: settings[field.name] for field in fields(Coefficients)})
    if coefficients.complete and coefficients.alignment == 0:
        parts = []
    elif coefficients.complete:
        parts = [f"alignment penalty λ_A = {settings['alignment']} on the complete Fisher quadratic form"]
    else:
        names = ("alignment", "task", "task_metric", "task_subspace", "collision", "alpha", "fisher_energy")
        parts = [", ".join(f"{name} {settings[name]}" for name in names)]
    if "drift_budget" in settings:
        parts.append(f"drift budget {settings['drift_budget']}")
    if "anchor_coef" in settings:
        parts.append(f"anchor {settings['anchor_coef']} every {settings['anchor_every']} steps")
    return ", ".join(parts)


def write_card(path: Path, name: str, report: DriftReport) -> None:
    """
    Turn the card that TRL wrote into the adapter's card: our description and evidence, TRL's training section, and the
    metadata an adapter needs (`library_name: peft`, sorted tags, no placeholder licence).

    Args:
        path (`Path`):
            README.md of the adapter, of TRL or of an earlier call.
        name (`str`):
            Title of the card.
        report ([`DriftReport`]):
            What to report; made by a trainer, so that it says what was trained.
    """
    card = ModelCard.load(path, ignore_metadata_errors=True)
    settings = report.metadata["coefficients"]
    base_model = report.metadata["base_model"]["name"]
    card.data.library_name = "peft"
    card.data.base_model = base_model
    card.data.pop("licence", None)  # TRL writes the placeholder `licence: license`
    card.data.tags = sorted({*(card.data.tags or []), "alignguard-lora", "lora"})
    kept = card.text[card.text.index(KEPT_FROM) :].split(CITATION)[0].rstrip()
    intro = _render("adapter.md.jinja", name=name, base_model=base_model, settings=describe_settings(settings))
    evidence = _render(
        "evidence.md.jinja", report=report, behaviour=report.behaviour, budget=settings.get("drift_budget")
    )
    card.text = f"{intro.strip()}\n\n{evidence.strip()}\n\n{kept}\n\n{CITATION}\n"
    write_atomically(path, str(card).encode())


def attach_card(
    path: Path,
    name: str,
    report: DriftReport,
    *,
    base_model: str | None = None,
    repo_id: str | None = None,
    statistics_published: bool = True,
) -> None:
    raise NotImplementedError
