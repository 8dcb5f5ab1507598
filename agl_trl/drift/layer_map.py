"""Drift by module and block, as a table to colour."""

from math import log
from typing import NamedTuple

from .plots import block_of, grid_names, module_of
from .report import DriftReport


NUMBERED = 8  # blocks up to which a cell has room for its number


class Cell(NamedTuple):
    """A layer: its drift, and its place from 0 to 100 on a logarithmic scale."""

    where: str
    drift: float
    heat: float


class LayerMap(NamedTuple):
    """
    All layers of a report.

    Args:
        blocks (`list[int]`):
            Numbers of the blocks.
        rows (`list[tuple[str, list[Cell | None]]]`):
            Modules, each with a cell for every block; `None` where there is no such layer.
        low, high (`float`):
            Ends of the scale.
    """

    blocks: list[int]
    rows: list[tuple[str, list[Cell | None]]]
    low: float
    high: float

    @property
    def numbered(self) -> bool:
        """Whether cells have room for their number."""
        return len(self.blocks) <= NUMBERED


def layer_map(report: DriftReport) -> LayerMap:
    """Map of a report that has layers."""
    modules, blocks = grid_names(report.layers)
    drifts = report.relative_drift.tolist()
    moved = [drift for drift in drifts if drift > 0] or [0.0]
    low, high = min(moved), max(moved)
    cells = {}
    for name, drift in zip(report.layers, drifts, strict=True):
        heat = 0.0 if drift <= 0 else 100.0 if low == high else 100 * log(drift / low) / log(high / low)
        cells[module_of(name), block_of(name)] = Cell(name, drift, heat)
    rows = [(module, [cells.get((module, block)) for block in blocks]) for module in modules]
    return LayerMap(blocks, rows, low, high)
