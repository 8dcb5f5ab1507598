"""Model cards: the evidence section that every pushed adapter carries."""

from importlib.resources import files
from pathlib import Path

from huggingface_hub import ModelCard
from jinja2 import Environment, StrictUndefined

from .artifacts import write_atomically
from .drift import DriftReport


SECTION_MARK = "<!-- agl_trl -->"


def evidence_section(report: DriftReport) -> str:
    """The Markdown section on one drift report."""
    template = files("agl_trl.model_cards").joinpath("evidence.md.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    settings = report.metadata.get("coefficients", {})
    return environment.from_string(template).render(
        report=report,
        behaviour=report.behaviour,
        coefficients=", ".join(f"{name} {value}" for name, value in settings.items() if value is not None),
        budget=settings.get("drift_budget"),
    )


def add_evidence(path: Path, report: DriftReport) -> None:
    """
    Put the evidence section at the end of an existing model card, or in place of an earlier one, and correct the
    metadata that an adapter needs: `library_name: peft`, sorted tags, no placeholder licence.

    Args:
        path (`Path`):
            README.md of the adapter.
        report ([`DriftReport`]):
            What to report.
    """
    card = ModelCard.load(path, ignore_metadata_errors=True)
    card.data.library_name = "peft"
    card.data.pop("licence", None)  # TRL writes the placeholder `licence: license`
    card.data.tags = sorted({*(card.data.tags or []), "alignguard-lora", "lora"})
    card.text = card.text.split(SECTION_MARK)[0].rstrip() + f"\n\n{SECTION_MARK}\n{evidence_section(report)}"
    write_atomically(path, str(card).encode())
