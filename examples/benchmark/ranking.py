"""Families of methods by the area that as many points of each dominate in the plane of drift and task loss."""

import math
import statistics as stats
from collections.abc import Iterable, Sequence
from itertools import combinations

from .methods import METHODS, SEEDED


Results = dict[tuple[str, str], list[dict]]
Point = tuple[float, float]
DRAWN = 3  # points of a family that are compared; more of them dominate more, whatever the method


def hypervolume(points: Iterable[Point]) -> float:
    """
    Area of the unit square that is dominated by points `(x, y)`, both better when smaller, against the corner (1, 1):
    `|∪ [x_i, 1] × [y_i, 1]|`. Coordinates are cut to [0, 1].
    """
    front = sorted((min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)) for x, y in points)
    area, lowest = 0.0, 1.0
    for x, y in front:
        area += max(lowest - y, 0.0) * (1 - x)
        lowest = min(lowest, y)
    return area


def expected_hypervolume(points: Sequence[Point], k: int = DRAWN) -> float:
    """Mean hypervolume of k points drawn without replacement, over all ways to draw them; of all where there are fewer."""
    return stats.mean(hypervolume(drawn) for drawn in combinations(points, min(k, len(points))))


def share(value: float, best: float, worst: float) -> float:
    """`ln(value / best) / ln(worst / best)`: 0 at the best, 1 at the worst."""
    return math.log(value / best) / math.log(worst / best)


def method_points(results: Results, protocol: str, aligned: dict) -> dict[str, Point]:
    """
    Drift and task loss of every method in one protocol, from the means over seeds.

    Drift is the NLL of held-out refusals: 0 at the aligned model's, 1 at plain LoRA's (a protocol in which plain LoRA loses
    nothing has no ranking). Task loss is the task's NLL: 0 at the best of all methods, 1 at the aligned model's. Both are on a log
    scale, and neither end is set by a method that fails.
    """
    means = {
        name: {key: stats.mean(run[key] for run in runs) for key in ("unsafe_nll", "task_nll")}
        for (of, name), runs in results.items()
        if of == protocol
    }
    if "lora" not in means or means["lora"]["unsafe_nll"] <= aligned["unsafe_nll"]:
        return {}
    best = min(mean["task_nll"] for mean in means.values())
    return {
        name: (
            share(mean["unsafe_nll"], aligned["unsafe_nll"], means["lora"]["unsafe_nll"]),
            share(mean["task_nll"], best, aligned["task_nll"]),
        )
        for name, mean in means.items()
    }


def by_family(found: dict[str, Point]) -> dict[str, list[Point]]:
    """The points of every family."""
    points: dict[str, list[Point]] = {}
    for name, point in found.items():
        points.setdefault(METHODS[name].family, []).append(point)
    return points


def best_of_families(found: dict[str, Point]) -> set[str]:
    """Of every family with several methods the one that dominates most by itself; none where none dominates anything."""
    names: dict[str, list[str]] = {}
    for name in found:
        names.setdefault(METHODS[name].family, []).append(name)
    area = {name: hypervolume([point]) for name, point in found.items()}
    best = {max(of_family, key=area.__getitem__) for of_family in names.values() if len(of_family) > 1}
    return {name for name in best if area[name] > 0}


def ranking(results: Results, aligned: dict[str, dict]) -> str:
    """
    Markdown table by family and protocol, by the mean over the protocols that the full comparison runs with every seed: the expected hypervolume of three
    points, that of one, that of the best one in every protocol, and how many points there were to draw from.
    """
    by_protocol = {protocol: by_family(method_points(results, protocol, line)) for protocol, line in aligned.items()}
    by_protocol = {protocol: found for protocol, found in by_protocol.items() if found}
    families = {family for found in by_protocol.values() for family in found}
    shared = [
        p for p in by_protocol if p in SEEDED and {METHODS[m].family for m in _core(results)} <= {*by_protocol[p]}
    ]
    full = {f for f in families if shared and all(f in by_protocol[p] for p in shared)}
    mean, alone = (
        {family: stats.mean(expected_hypervolume(by_protocol[p][family], k) for p in shared) for family in full}
        for k in (DRAWN, 1)
    )
    best = {f: stats.mean(max(hypervolume([point]) for point in by_protocol[p][f]) for p in shared) for f in full}
    lines = [
        f"| rank | family | mean, {DRAWN} points | mean, 1 point | mean, best point | "
        + " | ".join(by_protocol)
        + " |",
        "|---" * (5 + len(by_protocol)) + "|",
    ]
    for rank, family in enumerate(sorted(full, key=lambda f: (-mean[f], f)) + sorted(families - full), 1):
        cells = [_cell(by_protocol[p].get(family, [])) for p in by_protocol]
        if family in full:
            head = f"{rank} | {family} | {mean[family]:.3f} | {alone[family]:.3f} | {best[family]:.3f}"
        else:
            head = f"– | {family} | – | – | –"
        lines.append(f"| {head} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(points: Sequence[Point]) -> str:
    """Expected hypervolume, and of how many points they were drawn."""
    return f"{expected_hypervolume(points):.3f} ({len(points)})" if points else "–"


def _core(results: Results) -> set[str]:
    """Methods that ran on the most of these protocols."""
    counts = {name: sum(of == name and p in SEEDED for p, of in results) for _, name in results}
    return {name for name, count in counts.items() if count == max(counts.values())}
