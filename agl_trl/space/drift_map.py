"""How far each adapter moved the model: what its report says by layer, drawn as a table, bars and small curves."""

import math
from html import escape
from typing import Any

from ..artifacts.files import DRIFT_FILE, FOLDER, ArtifactError
from ..drift.plots import block_of, grid_names, module_of
from ..drift.report import DriftReport
from .models import Model, Side
from .side_by_side import notice_html


MEASURES = {
    "Relative drift": "relative_drift",
    "Alignment energy": "alignment_energy",
    "Task energy": "task_energy",
    "Overlap": "overlap",
}
_NUMBERED = 8  # blocks up to which cells show their figures
_CURVES = {"relative_drift": "relative drift", "loss": "loss"}


def read_report(side: Side) -> DriftReport:
    """
    The report beside an adapter.

    Raises:
        [`ArtifactError`]: If there is none, it is damaged, or it is of another adapter; the sentence is for visitors.
    """
    assert side.folder is not None
    if not (side.folder / FOLDER / DRIFT_FILE).is_file():
        raise ArtifactError(
            f"{side.detail} has no drift report ({FOLDER}/{DRIFT_FILE}). Its owner can add one: agl-trl attach {side.detail} --base …"
        )
    try:
        report = DriftReport.from_pretrained(side.folder)
        report.check_describes(side.folder)
    except ArtifactError as error:
        raise ArtifactError(str(error).replace(f"{side.folder}/", "")) from error
    return report


def reports(model: Model) -> list[tuple[Side, DriftReport | ArtifactError]]:
    """Adapters of a model with their reports, or with the reason why there is none to show."""
    found: list[tuple[Side, DriftReport | ArtifactError]] = []
    for side in model.sides[1:]:
        try:
            found.append((side, read_report(side)))
        except ArtifactError as error:
            found.append((side, error))
    return found


def summary(model: Model) -> list[dict[str, Any]]:
    """The reports for programs."""
    told: list[dict[str, Any]] = []
    for side, report in reports(model):
        if isinstance(report, ArtifactError):
            told.append({"model": side.title, "notice": str(report)})
            continue
        measures = {name: getattr(report, name).tolist() for name in MEASURES.values()}
        told.append(
            {
                "model": side.title,
                "notice": None,
                "mean_relative_drift": report.mean_relative_drift,
                "layers": report.layers,
                **measures,
                "history": {name: values.tolist() for name, values in report.history.items()},
            }
        )
    return told


def map_html(model: Model, measure: str) -> str:
    """All adapters beside each other, in one colour scale."""
    found = reports(model)
    values = [
        value
        for _, report in found
        if isinstance(report, DriftReport)
        for value in getattr(report, MEASURES[measure]).tolist()
        if value > 0
    ]
    scale = (min(values), max(values)) if values else (1.0, 1.0)
    panes = "".join(_adapter_html(side, report, measure, scale) for side, report in found)
    key = ""
    if values:
        key = (
            f'<p class="agl-key"><span>{scale[0]:.1e}</span><i></i><span>{scale[1]:.1e}</span> '
            f"<em>{escape(measure.lower())} on a logarithmic scale, relative to the size of the weights in the Fisher metric</em></p>"
        )
    return f'{key}<div class="agl-maps agl-of-{len(found)}">{panes}</div>'


def _adapter_html(side: Side, report: DriftReport | ArtifactError, measure: str, scale: tuple[float, float]) -> str:
    head = f"<header><div><h3>{escape(side.title)}</h3><p>{escape(side.detail)}</p></div></header>"
    if isinstance(report, ArtifactError):
        body = notice_html(str(report), "info")
    else:
        body = f"{_tiles(report)}{_heat_map(report, measure, scale)}{_energy(report)}{_history(report)}"
    return f'<section class="agl-pane agl-map agl-side-{side.key}" data-side="{side.key}">{head}{body}</section>'


def _tiles(report: DriftReport) -> str:
    total = report.relative_drift.sum()
    share = (report.alignment_energy.sum() / total).item() if total > 0 else 0.0
    tiles = [("mean relative drift", f"{report.mean_relative_drift:.2e}"), ("in alignment subspace", _percent(share))]
    if report.behaviour is not None:
        for unsafe, label in ((True, "unsafe refused"), (False, "harmless refused")):
            if (report.behaviour.unsafe == unsafe).any():
                before, after = (report.behaviour.refusal(tuned, unsafe).value for tuned in (False, True))
                tiles.append((label, f"{_percent(before)} → {_percent(after)}"))
    return (
        f'<dl class="agl-tiles">{"".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)}</dl>'
    )


def _percent(share: float) -> str:
    return f"{round(100 * share, 1):g} %"


def _heat_map(report: DriftReport, measure: str, scale: tuple[float, float]) -> str:
    modules, blocks = grid_names(report.layers)
    cells = {
        (module_of(name), block_of(name)): value
        for name, value in zip(report.layers, getattr(report, MEASURES[measure]).tolist(), strict=True)
    }
    head = "".join(f'<th scope="col">{block}</th>' for block in blocks)
    rows = []
    for module in modules:
        line = "".join(
            _cell(cells.get((module, block)), f"block {block}, {module}", scale, len(blocks)) for block in blocks
        )
        # The part that tells modules apart comes last, and is what a narrow screen has room for.
        rows.append(f'<tr><th scope="row" title="{escape(module)}">{escape(module.split(".")[-1])}</th>{line}</tr>')
    return (
        f'<h4>{escape(measure)} by layer</h4><div class="agl-scroll" tabindex="0" role="region" aria-label="{escape(measure)} by layer">'
        f'<table class="agl-heat"><thead><tr><th scope="col">block</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _cell(value: float | None, where: str, scale: tuple[float, float], blocks: int) -> str:
    if value is None:
        return "<td></td>"
    low, high = (math.log(bound) for bound in scale)
    heat = 0.0 if value <= 0 else 1.0 if high == low else (math.log(value) - low) / (high - low)
    text = (
        f"{value:.0e}".replace("e-0", "e-") if blocks <= _NUMBERED else f'<span class="agl-unseen">{value:.1e}</span>'
    )
    hot = " class=agl-hot" if heat > 0.5 else ""
    return f'<td{hot} style="--heat:{100 * heat:.0f}%" title="{escape(where)}: {value:.2e}">{text}</td>'


def _energy(report: DriftReport) -> str:
    """Share of either part in the drift of every block."""
    lines = []
    for block in grid_names(report.layers)[1]:
        chosen = [i for i, name in enumerate(report.layers) if block_of(name) == block]
        alignment, task = (getattr(report, name)[chosen].mean().item() for name in ("alignment_energy", "task_energy"))
        share = alignment / (alignment + task) if alignment + task > 0 else 0.0
        text = f"block {block}: alignment {alignment:.2e}, task {task:.2e}"
        lines.append(
            f'<div class="agl-energy" title="{text}"><span>block {block}</span><span class="agl-share" role="img" aria-label="{text}">'
            f'<i style="width:{100 * share:.1f}%"></i></span><span>{alignment + task:.1e}</span></div>'
        )
    legend = '<ul class="agl-legend"><li class="agl-alignment"><i></i>alignment energy</li><li class="agl-task"><i></i>task energy</li></ul>'
    return f"<h4>What the drift is made of</h4>{legend}{''.join(lines)}"


def _history(report: DriftReport) -> str:
    steps = report.history["step"].tolist() if "step" in report.history else []
    curves = [
        _curve(title, steps, report.history[name].tolist())
        for name, title in _CURVES.items()
        if name in report.history and len(steps) > 1 and report.history[name].abs().max() > 0
    ]
    body = (
        f'<div class="agl-curves">{"".join(curves)}</div>'
        if curves
        else '<p class="agl-hint">The report has no training history.</p>'
    )
    return f"<h4>During training</h4>{body}"


def _curve(title: str, steps: list[float], values: list[float]) -> str:
    low, high = min(values), max(values)
    width, span = (steps[-1] - steps[0]) or 1, (high - low) or 1
    points = " ".join(
        f"{100 * (step - steps[0]) / width:.2f},{38 - 36 * (value - low) / span:.2f}"
        for step, value in zip(steps, values, strict=True)
        if math.isfinite(value)
    )
    text = f"{title}: {values[0]:.3g} at step {steps[0]:g}, {values[-1]:.3g} at step {steps[-1]:g}"
    return (
        f'<figure><svg viewBox="0 0 100 40" preserveAspectRatio="none" role="img" aria-label="{text}"><polyline points="{points}"/></svg>'
        f"<figcaption><b>{title}</b><span>{values[0]:.2g} → {values[-1]:.2g}, step {steps[-1]:g}</span></figcaption></figure>"
    )
