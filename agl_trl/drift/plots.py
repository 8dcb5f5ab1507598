"""The pictures that travel with an adapter. Figures are made without global state, and their bytes are reproducible."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..artifacts.extras import MissingExtra, needs_extra
from ..artifacts.files import write_atomically
from ..evaluation.behaviour import Behaviour
from ..evaluation.rates import Rate
from .report import DriftReport


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)
BASE_COLOR, TUNED_COLOR = "#4c566a", "#2e7d5b"
OTHER_COLORS = ("#c2503c", "#d8a24a", "#7b6ba8")
BLOCK_NUMBER = re.compile(r"\.(\d+)\.")


def plot_drift(
    report: DriftReport, path: Path, name: str = "fine-tuned", others: Mapping[str, Behaviour] | None = None
) -> None:
    """
    Draw refusal before and after by category (where prompts were run) and relative drift by layer. Without matplotlib the
    picture is left out, with one warning: no run is to end for want of it. There is none of a report that has neither.

    Args:
        report ([`DriftReport`]):
            Report to draw.
        path (`Path`):
            PNG to write.
        name (`str`, *optional*, defaults to `"fine-tuned"`):
            What the tuned model is called.
        others (`Mapping[str, Behaviour]`, *optional*):
            Other adapters' answers to the same prompts, by name, drawn beside.

    Raises:
        `OSError`: If the picture can't be written.
    """
    content = picture(report, name, others)
    if content is None:
        path.unlink(missing_ok=True)  # an earlier one, of another report
    else:
        write_atomically(path, content)


def picture(
    report: DriftReport, name: str = "fine-tuned", others: Mapping[str, Behaviour] | None = None
) -> bytes | None:
    """The picture of [`plot_drift`] as PNG, or none where there is nothing to draw, or no matplotlib."""
    if not report.layers and report.behaviour is None:
        return None
    try:
        return png(_figure(report, name, others or {}))
    except MissingExtra as error:
        _warn_once(f"There is no picture beside the drift report. {error}")
        return None


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def new_figure(width: float, height: float) -> Figure:
    """
    An empty figure, of a size in inches.

    Raises:
        [`MissingExtra`]: If matplotlib is not installed.
    """
    with needs_extra("report", "Pictures"):
        from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _figure(report: DriftReport, name: str, others: Mapping[str, Behaviour]) -> Figure:
    behaviour = report.behaviour
    rows = _behaviour_rows(behaviour) if behaviour is not None else []
    modules, blocks = grid_names(report.layers)
    height = max(3.2, 0.42 * len(rows) + 1.3, 0.34 * len(modules) + 1.6)
    figure = new_figure(11 if rows and modules else 6.5, height)
    panels = figure.subplots(1, 2, width_ratios=(1.25, 1)) if rows and modules else [figure.subplots()]
    if behaviour is not None:
        _draw_behaviour(panels[0], rows, behaviour, {**others, name: behaviour})
    if modules:
        _draw_layers(panels[-1], report, modules, blocks)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as PNG, without the name of the program, so that the bytes are reproducible."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    return buffer.getvalue()


def _behaviour_rows(behaviour: Behaviour) -> list[tuple[str, bool]]:
    """`(category, unsafe)` of every line of the chart: unsafe categories first, safe prompts as one line at the end."""
    unsafe = behaviour.categories_of(True)
    return [(category, True) for category in unsafe] + (
        [("safe prompts", False)] if not behaviour.unsafe.all() else []
    )


def _draw_behaviour(axes: Axes, rows: list[tuple[str, bool]], base: Behaviour, tuned: Mapping[str, Behaviour]) -> None:
    colors = dict(zip(list(tuned)[:-1], OTHER_COLORS, strict=False)) | {list(tuned)[-1]: TUNED_COLOR}
    lines = [("before", BASE_COLOR, base, False)] + [(n, colors[n], b, True) for n, b in tuned.items()]
    offsets = np.linspace(-0.22, 0.22, len(lines))
    for (label, color, behaviour, is_tuned), offset in zip(lines, offsets, strict=True):
        rates = [behaviour.refusal(is_tuned, unsafe, category if unsafe else None) for category, unsafe in rows]
        _draw_rates(axes, rates, np.arange(len(rows)) + offset, color, label)
    axes.set_yticks(range(len(rows)), [category.replace("_", " ") for category, _ in rows], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(-0.03, 1.03)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="x", alpha=0.3)
    if not rows[-1][1]:
        axes.axhline(len(rows) - 1.5, color="#999999", linewidth=0.8)
    axes.set_title("Refused, with 95 % interval (safe prompts: lower is better)", fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=len(lines), frameon=False, fontsize=9)
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)


def _draw_rates(axes: Axes, rates: list[Rate], positions: np.ndarray, color: str, label: str) -> None:
    values = np.array([rate.value for rate in rates])
    low, high = np.array([rate.interval for rate in rates]).T
    errors = np.clip([values - low, high - values], 0, None)
    axes.errorbar(values, positions, xerr=errors, fmt="o", color=color, label=label, markersize=5, elinewidth=1.4)


def grid_names(layers: list[str]) -> tuple[list[str], list[int]]:
    """Modules (such as `self_attn.q_proj`) in order of appearance, and block numbers; a layer in no block is block 0."""
    modules = dict.fromkeys(module_of(name) for name in layers)
    return list(modules), sorted({block_of(name) for name in layers})


def block_of(name: str) -> int:
    match = BLOCK_NUMBER.search(name)
    return int(match.group(1)) if match else 0


def module_of(name: str) -> str:
    return BLOCK_NUMBER.split(name)[-1]


def _draw_layers(axes: Axes, report: DriftReport, modules: list[str], blocks: list[int]) -> None:
    grid = np.full((len(modules), len(blocks)), np.nan)
    for name, drift in zip(report.layers, report.relative_drift.tolist(), strict=True):
        grid[modules.index(module_of(name)), blocks.index(block_of(name))] = drift
    from matplotlib.colors import LogNorm

    axes.set_title(f"Relative drift by layer, mean {report.mean_relative_drift:.2e}", fontsize=10)
    axes.set_yticks(range(len(modules)), modules, fontsize=8, parse_math=False)
    axes.set_xlabel("block")
    positive = grid[grid > 0]
    if positive.size == 0:
        axes.imshow(np.zeros_like(grid), aspect="auto", cmap="magma", vmin=0, vmax=1)
        return
    norm = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.01))
    image = axes.imshow(np.where(grid > 0, grid, np.nan), aspect="auto", cmap="magma", norm=norm)
    step = max(1, len(blocks) // 12)
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axes.figure.colorbar(image, ax=axes, label="‖ΔW‖² / ‖W‖² in the Fisher metric")
