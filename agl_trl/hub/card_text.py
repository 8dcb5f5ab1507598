"""Text of model cards: templates, and what others named in a form that can't break them."""

import re
from dataclasses import fields
from importlib.resources import files
from math import inf, isnan
from typing import Any

from ..drift.protected import KINDS, over_budget
from ..drift.report import DriftReport
from ..evaluation.behaviour import Behaviour
from ..evaluation.rates import Rate
from ..evaluation.served import served_facts
from ..objective.alignguard import Coefficients
from .card_metadata import one_line, prompt_set, without_folder


SPECIAL = re.compile(r"[\\`*\[\]|~$#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def plain(text: Any) -> str:
    """A name that others chose as Markdown that shows it and does nothing else: no cell, no link, no tag, no second line."""
    shown = one_line(without_folder(str(text))).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return SPECIAL.sub(r"\\\g<0>", shown)


def _with_interval(rate: Rate) -> str:
    low, high = rate.interval
    return f"{100 * rate.value:.1f} % ({100 * low:.1f} to {100 * high:.1f} %)"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or isnan(value) else format(value, form)


def render(template: str, **values: Any) -> str:
    """A template of the package with these values; one that it uses and that is missing is an error."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.globals["infinity"] = inf
    environment.filters |= {"plain": plain, "interval": _with_interval, "number": _number}
    text = files("agl_trl.model_cards").joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(**values).strip()


def describe_settings(settings: dict[str, Any]) -> str:
    """
    The objective of a run in words, from the coefficients in its report; what a report of an older version lacks has its
    default.
    """
    if settings.get("variant") == "paper":
        return "the objective as published, as far as it is known"
    alignment = settings.get("alignment", 0.0)
    told = {field.name: settings[field.name] for field in fields(Coefficients) if field.name in settings}
    coefficients = Coefficients(**{"alignment": alignment, "task": alignment} | told)
    parts = []
    if not coefficients.complete:
        names = ("alignment", "task", "task_metric", "task_subspace", "collision", "alpha", "fisher_energy")
        parts = [", ".join(f"{name} {getattr(coefficients, name)}" for name in names)]
    elif coefficients.alignment != 0:
        parts = [f"alignment penalty λ_A = {coefficients.alignment} on the complete Fisher quadratic form"]
    if settings.get("kl_budget") is not None:
        parts.append(f"KL budget {settings['kl_budget']} nats per answer token on protected rows")
    if settings.get("drift_budget") is not None:
        parts.append(f"drift budget {settings['drift_budget']}")
    if settings.get("trust_radius"):
        parts.append(f"trust region of {settings['trust_radius']} budgets in the Fisher metric")
    if settings.get("fisher_coef"):  # of earlier versions
        parts.append(f"Fisher form {settings['fisher_coef']}")
    if settings.get("anchor_coef"):
        every = f" every {settings['anchor_every']} steps" if "anchor_every" in settings else ""
        parts.append(f"anchor {settings['anchor_coef']}{every}")
    return ", ".join(parts)


def _categories(behaviour: Behaviour) -> list[tuple[str, str, Rate, Rate]]:
    """Kind, category, and both rates of every category, in a stable order; nothing where there is only one."""
    found = sorted({(not u, c) for u, c in zip(behaviour.unsafe.tolist(), behaviour.categories, strict=True)})
    if len({category for _, category in found}) < 2:
        return []
    return [
        (
            "safe" if safe else "unsafe",
            category,
            behaviour.refusal(False, not safe, category),
            behaviour.refusal(True, not safe, category),
        )
        for safe, category in found
    ]


def render_evidence(
    report: DriftReport,
    repo_id: str | None,
    statistics_published: bool,
    references_published: bool = True,
    *,
    statistics_saved: bool = True,
    picture: bool = True,
) -> str:
    """
    The section about what was measured.

    Args:
        report ([`DriftReport`]):
            What to report.
        repo_id (`str`, *optional*):
            Id of the adapter's repo on the Hub, for the code.
        statistics_published (`bool`):
            Whether the Fisher statistics lie beside the report for all who read it.
        references_published (`bool`, *optional*, defaults to `True`):
            Whether the reference answers do.
        statistics_saved (`bool`, *optional*, defaults to `True`):
            Whether statistics that are not published were saved at all.
        picture (`bool`, *optional*, defaults to `True`):
            Whether there is a picture of the drift.
    """
    behaviour = report.behaviour
    values: dict[str, Any] = {}
    if behaviour is not None:
        prompts, licence = prompt_set(behaviour)
        values = {
            "kinds": [unsafe for unsafe in (True, False) if (behaviour.unsafe == unsafe).any()],
            "categories": _categories(behaviour),
            "facts": {
                "judge": None,
                "verdicts": None,
                "decoding": None,
                "tokenizer_set_aside": None,
                "unasked": None,
                "kl_tokens": None,
                "prompts_sha256": None,
                **behaviour.metadata,
            },
            "prompts": prompts,
            "licence": licence,
        }
    protected, settings = report.metadata.get("protected"), report.metadata.get("coefficients") or {}
    return render(
        "evidence.md.jinja",
        protected=protected,
        held=protected is not None and not over_budget(protected),
        kinds_in_words=KINDS,
        references_published=references_published,
        report=report,
        behaviour=behaviour,
        abilities=report.abilities,
        served=[] if behaviour is None or behaviour.served is None else served_facts(behaviour.served),
        budget=settings.get("drift_budget"),
        kl_budget=settings.get("kl_budget"),
        continued=bool(report.metadata.get("continued")),
        projected=report.metadata.get("projected"),
        num_tokens=(report.metadata.get("fisher") or {}).get("num_tokens"),
        repo_id=repo_id,
        statistics_published=statistics_published,
        statistics_saved=statistics_saved,
        picture=picture,
        **values,
    )


def render_adapter(name: str, report: DriftReport, base_model: str | None, repo_id: str | None) -> str:
    """Title, what the adapter is, and how to use it."""
    settings = report.metadata.get("coefficients")
    return render(
        "adapter.md.jinja",
        name=name,
        method={"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr"}.get(report.method, report.method),
        base_model=base_model,
        revision=(report.metadata.get("base_model") or {}).get("revision"),
        trained=settings is not None,
        settings=None if settings is None else describe_settings(settings),
        continued=bool(report.metadata.get("continued")),
        repo_id=repo_id,
    )
