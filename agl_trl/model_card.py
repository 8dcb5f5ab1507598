"""Model cards: what an adapter is, how far it moved, what was asked of it, and what was not."""

import re
from dataclasses import fields
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from .artifacts import write_atomically
from .drift import DriftReport
from .fisher import FisherStatistics
from .objective import Coefficients


# TRL's card from here on (run links, versions, citations) is kept; what it says before, our templates say.
KEPT_FROM = "## Training procedure"
PEFT_STUB = "# Model Card for Model ID"
BEGIN, END = "<!-- agl_trl: begin -->", "<!-- agl_trl: end -->"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TAG = "alignguard-lora"
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


def plain(text: Any) -> str:
    """Text of a user or a dataset as it may stand in a table cell: no markup, one line."""
    return escape(" ".join(str(text).split()), quote=False).replace("|", "&#124;").replace("`", "'")


def _render(template: str, **values: Any) -> str:
    text = files("agl_trl.model_cards").joinpath(template).read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["plain"] = plain
    return environment.from_string(text).render(**values).strip()


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


def declared_license(path: Path) -> str | None:
    """Licence that somebody wrote into a card; TRL's placeholder (`licence: license`) is none."""
    return ModelCard.load(path, ignore_metadata_errors=True).data.license if path.is_file() else None


def write_card(
    path: Path,
    name: str,
    report: DriftReport,
    *,
    repo_id: str | None = None,
    statistics_published: bool = True,
    license: str | None = None,
) -> None:
    """
    Turn the card that TRL wrote into the adapter's card: our description and evidence, TRL's training section, and the
    metadata an adapter needs. The same bytes when repeated.

    Args:
        path (`Path`):
            README.md of the adapter, of TRL or of an earlier call.
        name (`str`):
            Title of the card.
        report ([`DriftReport`]):
            What to report; made by a trainer, so that it says what was trained.
        repo_id (`str`, *optional*):
            Where the adapter is pushed to, for the snippets.
        statistics_published (`bool`, *optional*, defaults to `True`):
            Whether the Fisher statistics are pushed too.
        license (`str`, *optional*):
            Licence that its owner declared; none is ever made up.
    """
    card = ModelCard.load(path, ignore_metadata_errors=True)
    base_model = _hub_id(report.metadata["base_model"]["name"])
    _describe(card.data, name, report, base_model)
    card.data.license = license or card.data.license
    kept = card.text[card.text.index(KEPT_FROM) :].split(CITATION)[0].rstrip()
    settings = report.metadata["coefficients"]
    intro = _render(
        "adapter.md.jinja", name=name, base_model=base_model, settings=describe_settings(settings), repo_id=repo_id
    )
    evidence = _evidence(report, repo_id, statistics_published)
    card.text = f"\n{intro}\n\n{evidence}\n\n{kept}\n\n{CITATION}\n"
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
    """
    Add the report to the card of an adapter trained elsewhere: one section between two markers, replaced when repeated;
    everything else stays. Without a card, or with the stub that PEFT writes, a whole one is made.

    Args:
        path (`Path`):
            README.md of the adapter.
        name (`str`):
            Name of the model, and title of a card that has to be made.
        report ([`DriftReport`]):
            What to report.
        base_model (`str`, *optional*):
            Hub id of the base model; by default the one in the report.
        repo_id (`str`, *optional*):
            Repo of the adapter, for the snippets.
        statistics_published (`bool`, *optional*, defaults to `True`):
            Whether the Fisher statistics are beside the report.

    Raises:
        `ValueError`: If the metadata of the card is not valid YAML.
    """
    base_model = _hub_id(base_model) or _hub_id(report.metadata["base_model"]["name"])
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    try:
        card = ModelCard(text or "---\n{}\n---\n", ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"The metadata of the card '{path}' is not valid YAML: mend it first.") from error
    if not card.text.strip() or PEFT_STUB in card.text:
        settings = report.metadata.get("coefficients")
        settings = None if settings is None else describe_settings(settings)
        card.text = _render("adapter.md.jinja", name=name, base_model=base_model, settings=settings, repo_id=repo_id)
    _describe(card.data, name, report, base_model)
    section = f"{BEGIN}\n\n{_evidence(report, repo_id, statistics_published)}\n\n{CITATION}\n\n{END}"
    if BEGIN in card.text and END in card.text:
        before, rest = card.text.split(BEGIN, 1)
        section = before + section + rest.split(END, 1)[1]
    else:
        section = f"{card.text.strip()}\n\n{section}\n"
    card.text = f"\n{section.strip()}\n"
    write_atomically(path, str(card).encode())


def write_statistics_card(path: Path, name: str, statistics: FisherStatistics, *, repo_id: str | None = None) -> None:
    """Write the card of a repo that holds Fisher statistics alone."""
    base = statistics.metadata["base_model"]
    base_model = _hub_id(base["name"])
    data = ModelCardData(base_model=base_model, tags=sorted({TAG, "fisher-information"}))
    text = _render(
        "fisher.md.jinja",
        name=name,
        base_model=base_model,
        statistics=statistics,
        metadata=statistics.metadata,
        dataset=statistics.metadata.get("dataset"),
        repo_id=repo_id,
    )
    write_atomically(path, f"---\n{data}\n---\n\n{text}\n\n{CITATION}\n".encode())


def _hub_id(name: str | None) -> str | None:
    """The name if it can be an id on the Hub; never a path."""
    return name if name is not None and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _evidence(report: DriftReport, repo_id: str | None, statistics_published: bool) -> str:
    budget = report.metadata.get("coefficients", {}).get("drift_budget")
    behaviour = report.behaviour
    categories: list[tuple[str, bool]] = []
    if behaviour is not None:
        categories = sorted(set(zip(behaviour.categories, behaviour.unsafe.tolist(), strict=True)))
    return _render(
        "evidence.md.jinja",
        report=report,
        behaviour=behaviour,
        categories=categories if len(categories) > 2 else [],
        budget=budget,
        adapter=repo_id or "path/to/this/adapter",
        statistics_published=statistics_published,
    )


def _describe(data: CardData, name: str, report: DriftReport, base_model: str | None) -> None:
    """Metadata of an adapter: what the Hub sorts and shows it by."""
    assert isinstance(data, ModelCardData)
    data["library_name"], data["pipeline_tag"] = "peft", "text-generation"
    data.pop("licence", None)  # TRL writes the placeholder `licence: license`
    tags = {tag for tag in data.tags or [] if not tag.startswith("base_model:")} | {TAG, "lora", "transformers"}
    data.pop("base_model"), data.pop("base_model_relation")
    if base_model is not None:
        data["base_model"], data["base_model_relation"] = base_model, "adapter"
        tags.add(f"base_model:adapter:{base_model}")
    data.tags = sorted(tags)
    datasets = [data.datasets] if isinstance(data.datasets, str) else data.datasets or []
    data.datasets = [dataset for dataset in datasets if _hub_id(dataset) and dataset != "miniworld"] or None
    data.model_name, data.eval_results = name, _results(report)


def _results(report: DriftReport) -> list[EvalResult]:
    """The figures of a report for `model-index`."""
    figures = [("relative_drift", "Relative drift, mean over layers", float(f"{report.mean_relative_drift:.4g}"))]
    asked = "weights"
    if (behaviour := report.behaviour) is not None:
        asked = behaviour.metadata.get("prompts", {}).get("name") or "prompts"
        for unsafe, key, title in (
            (True, "refusal_rate", "Unsafe requests refused"),
            (False, "over_refusal", "Safe requests refused"),
        ):
            if (behaviour.unsafe == unsafe).any():
                before, after = (round(behaviour.refusal(tuned, unsafe).value, 4) for tuned in (False, True))
                figures += [(key, title, after), (f"{key}_base", f"{title} by the base model", before)]
                figures.append(
                    (
                        f"kl_{key}",
                        f"KL to the base model, {title.split()[0].lower()}",
                        round(behaviour.mean_kl(unsafe), 4),
                    )
                )
    return [
        EvalResult(
            "text-generation", plain(asked), plain(asked), key, value, task_name="Alignment drift", metric_name=title
        )
        for key, title, value in figures
    ]
