"""How far each adapter moved the model: what its report says by layer, by block and during training."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..artifacts.files import DRIFT_FILE, FOLDER, ArtifactError
from ..drift.plots import block_of, grid_names, module_of
from ..drift.report import DriftReport
from .models import Model, Side


MEASURES = {
    "Relative drift": "relative_drift",
    "Alignment energy": "alignment_energy",
    "Task energy": "task_energy",
    "Overlap": "overlap",
}
_CURVES = {"relative_drift": "relative drift", "loss": "loss"}


class Scale(NamedTuple):
    """Bounds of a colour scale, which is logarithmic."""

    low: float
    high: float

    def heat(self, value: float) -> float:
        """Place of a value on the scale, from 0 to 1."""
        if value <= 0:
            return 0.0
        if self.low == self.high:
            return 1.0
        return math.log(value / self.low) / math.log(self.high / self.low)


class Refusals(NamedTuple):
    """Share of prompts that base and fine-tuned model refuse."""

    unsafe: bool
    before: float
    after: float


class Energy(NamedTuple):
    """Parts of the drift of a block, means over its layers."""

    block: int
    alignment: float
    task: float

    @property
    def total(self) -> float:
        return self.alignment + self.task

    @property
    def share(self) -> float:
        """Of the alignment part."""
        return self.alignment / self.total if self.total > 0 else 0.0


class Curve(NamedTuple):
    """A value by training step."""

    title: str
    points: list[tuple[float, float]]

    def scaled(self) -> list[tuple[float, float]]:
        """Points within a square of side 1."""
        steps, values = zip(*self.points, strict=True)
        width, height = (steps[-1] - steps[0]) or 1, (max(values) - min(values)) or 1
        return [((step - steps[0]) / width, (value - min(values)) / height) for step, value in self.points]


@dataclass(frozen=True)
class AdapterDrift:
    """
    What is drawn of a report.

    Args:
        report (`DriftReport`): The report.
        values (`dict[tuple[str, int], float]`): The chosen measure by module and block.
    """

    report: DriftReport
    values: dict[tuple[str, int], float]

    @property
    def modules(self) -> list[str]:
        return grid_names(self.report.layers)[0]

    @property
    def blocks(self) -> list[int]:
        return grid_names(self.report.layers)[1]

    @property
    def alignment_share(self) -> float:
        total = self.report.relative_drift.sum()
        return (self.report.alignment_energy.sum() / total).item() if total > 0 else 0.0

    @property
    def refusals(self) -> list[Refusals]:
        """On unsafe and on harmless prompts, where the report has any."""
        behaviour = self.report.behaviour
        return [
            Refusals(unsafe, *(behaviour.refusal(tuned, unsafe).value for tuned in (False, True)))
            for unsafe in (True, False)
            if behaviour is not None and (behaviour.unsafe == unsafe).any()
        ]

    @property
    def energies(self) -> list[Energy]:
        found = []
        for block in self.blocks:
            chosen = [i for i, name in enumerate(self.report.layers) if block_of(name) == block]
            alignment, task = self.report.alignment_energy[chosen], self.report.task_energy[chosen]
            found.append(Energy(block, alignment.mean().item(), task.mean().item()))
        return found

    @property
    def curves(self) -> list[Curve]:
        """Those of at least two points that are not all zero."""
        history = {name: values.tolist() for name, values in self.report.history.items()}
        found = []
        for name, title in _CURVES.items():
            pairs = zip(history["step"], history[name], strict=True) if {"step", name} <= {*history} else ()
            points = [(step, value) for step, value in pairs if math.isfinite(value)]
            if len(points) > 1 and any(value for _, value in points):
                found.append(Curve(title, points))
        return found


class Panel(NamedTuple):
    """An adapter, and what is drawn of it or the reason why nothing is."""

    side: Side
    drift: AdapterDrift | None
    notice: str | None


class DriftMap(NamedTuple):
    """All adapters of a model beside each other, in one colour scale."""

    measure: str
    panels: list[Panel]
    scale: Scale | None


def read_report(folder: Path, name: str) -> DriftReport:
    """
    The report beside an adapter.

    Args:
        folder (`Path`): Folder of the adapter.
        name (`str`): What visitors know it by.

    Raises:
        [`ArtifactError`]: If there is none, it is damaged, or it is of another adapter; the sentence is for visitors.
    """
    if not (folder / FOLDER / DRIFT_FILE).is_file():
        raise ArtifactError(
            f"{name} has no drift report ({FOLDER}/{DRIFT_FILE}). Its owner can add one: agl-trl attach {name} --base …"
        )
    try:
        report = DriftReport.from_pretrained(folder)
        report.check_describes(folder)
    except ArtifactError as error:
        raise ArtifactError(str(error).replace(f"{folder}/", "")) from error
    return report


def reports(model: Model) -> list[tuple[Side, DriftReport | ArtifactError]]:
    """Adapters of a model with their reports, or with the reason why there is none to show."""
    found: list[tuple[Side, DriftReport | ArtifactError]] = []
    for side in model.sides:
        if side.folder is not None:
            try:
                found.append((side, read_report(side.folder, side.detail)))
            except ArtifactError as error:
                found.append((side, error))
    return found


def summary(model: Model) -> list[dict[str, Any]]:
    """The reports for programs."""
    return [
        {"model": side.title, "notice": str(report)}
        if isinstance(report, ArtifactError)
        else {
            "model": side.title,
            "notice": None,
            "mean_relative_drift": report.mean_relative_drift if report.layers else None,
            "without_weights": report.without_weights,
            "layers": report.layers,
            **{name: getattr(report, name).tolist() for name in MEASURES.values()},
            "history": {name: values.tolist() for name, values in report.history.items()},
        }
        for side, report in reports(model)
    ]


def drift_map(model: Model, measure: str) -> DriftMap:
    """
    What is drawn of a model.

    Args:
        model ([`Model`]): Base and adapters.
        measure (`str`): One of [`MEASURES`].
    """
    panels: list[Panel] = []
    above_zero: list[float] = []
    for side, report in reports(model):
        if isinstance(report, ArtifactError):
            panels.append(Panel(side, None, str(report)))
            continue
        values: list[float] = getattr(report, MEASURES[measure]).tolist()
        places = [(module_of(name), block_of(name)) for name in report.layers]
        panels.append(Panel(side, AdapterDrift(report, dict(zip(places, values, strict=True))), None))
        above_zero += [value for value in values if value > 0]
    return DriftMap(measure, panels, Scale(min(above_zero), max(above_zero)) if above_zero else None)
