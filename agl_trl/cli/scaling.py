"""What `agl-trl scaling` does."""

import csv
import json
from pathlib import Path

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from ..artifacts.files import canonical_json, check_writable, first_line, write_atomically
from ..drift.plots import new_figure, png
from ..experiments.scaling_law import Fit, Law, Runs, fit, typical_increase


COLUMNS = ("method", "n_params", "finetune_tokens", "loss_before", "loss_after")
SYMBOLS = {"A": "A", "alpha": "α", "beta": "β", "E": "E"}
ERRORS = {
    "error of the fit": "relative_error",
    "error, point unseen": "held_out_point_error",
    "error, size unseen": "held_out_error",
}


def scaling(*, output_dir: Path, runs: Path | None, seeds: int, resamples: int, seed: int) -> None:
    """
    Fit the law of forgetting to every method in a file, print the coefficients, write `scaling.json` and `scaling.png`.

    Args:
        output_dir (`Path`):
            Folder of what is written.
        runs (`Path`, *optional*):
            File of runs, as [`load_runs`] reads it; by default the embedded models are fine-tuned.
        seeds (`int`):
            Runs of every kind, where models are fine-tuned.
        resamples (`int`):
            Bootstrap resamples.
        seed (`int`):
            Seed of the resamples.

    Raises:
        `ValueError`: If the file can't be read or holds too little.
        `OSError`: If the folder can't be written.
    """
    check_writable(output_dir)
    if runs is None:  # the trainers are imported where they are needed
        from transformers.utils.logging import disable_progress_bar

        from ..experiments.scaling_sweep import sweep

        disable_progress_bar()  # of loading a small model, again and again
        runs = sweep(output_dir, seeds, console=Console())
    methods = load_runs(runs)
    fits = {name: fit(runs, resamples=resamples, seed=seed) for name, runs in methods.items()}
    console = Console()
    table = Table("", *fits, title="L_pt = L0_pt + A · D_ft^β / N^α + E", title_justify="left")
    table.add_row("runs", *(str(len(runs.increase)) for runs in methods.values()))
    for key, symbol in SYMBOLS.items():
        cells = []
        for found in fits.values():
            low, high = found.intervals[key]
            cells.append(f"{getattr(found.law, key):.3g} ({low:.2g} – {high:.2g})")
        table.add_row(symbol, *cells)
    typical = (typical_increase(found.law, [*methods.values()]) for found in fits.values())
    table.add_row("ΔL of a typical run", *(f"{value:.3g}" for value in typical))
    for title, key in ERRORS.items():
        table.add_row(title, *(f"{getattr(found, key):.1%}" for found in fits.values()))
    console.print(table)
    console.print("In brackets: bootstrap 95 % intervals. Errors: mean of |ΔL_fit - ΔL| / |ΔL|.", highlight=False)
    for name, found in fits.items():
        for doubt in found.doubts:
            console.print(f"{name}: {doubt}", highlight=False)
    write_atomically(output_dir / "scaling.json", canonical_json(described(fits)).encode())
    write_atomically(output_dir / "scaling.png", surfaces(methods, fits))
    typer.echo(f"{output_dir / 'scaling.json'}, {output_dir / 'scaling.png'}")


def load_runs(path: Path) -> dict[str, Runs]:
    """
    Runs by method, from a table with commas, or with tabs where it ends in `.tsv`, or from JSON lines where it ends in
    `.jsonl` or `.json`.

    Args:
        path (`Path`):
            File with the columns of `COLUMNS`.

    Raises:
        `ValueError`: If there is no such file, a column is missing, or a cell is no number.
    """
    if not path.is_file():
        raise ValueError(f"There is no file '{path}'.")
    kind = path.suffix.lower()
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # Excel marks its files
            rows = (
                [json.loads(line) for line in file if line.strip()]
                if kind in (".jsonl", ".json")
                else [*csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",")]
            )
    except (ValueError, csv.Error) as error:
        raise ValueError(f"Can't read runs from '{path}': {first_line(error)}.") from error
    found: dict[str, list[tuple[float, float, float]]] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not set(COLUMNS) <= {*row}:
            raise ValueError(f"Run {number} of '{path}' lacks one of the columns {', '.join(COLUMNS)}.")
        try:
            n_params, tokens, before, after = (float(row[name]) for name in COLUMNS[1:])
        except (TypeError, ValueError) as error:
            raise ValueError(f"Run {number} of '{path}' has a value that is no number.") from error
        if not np.isfinite([n_params, tokens, before, after]).all():
            raise ValueError(f"Run {number} of '{path}' has a value that is not finite.")
        found.setdefault(str(row["method"]), []).append((n_params, tokens, after - before))
    if not found:
        raise ValueError(f"There is no run in '{path}'.")
    return {name: Runs(*np.array(runs).T) for name, runs in found.items()}


def described(fits: dict[str, Fit]) -> dict:
    """Fits as JSON; an error that could not be taken is null."""
    return {
        name: found._asdict()
        | {
            "law": found.law._asdict(),
            "held_out_error": None if np.isnan(found.held_out_error) else found.held_out_error,
            "held_out_point_error": None if np.isnan(found.held_out_point_error) else found.held_out_point_error,
        }
        for name, found in fits.items()
    }


def surfaces(methods: dict[str, Runs], fits: dict[str, Fit]) -> bytes:
    """One panel per method: measured increases over tokens, a line of the law for every model size."""
    figure = new_figure(5 * len(methods), 4)
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for panel, (name, runs) in zip(panels, methods.items(), strict=True):
        law: Law = fits[name].law
        for shade, size in enumerate(np.unique(runs.n_params)):
            chosen = runs.n_params == size
            colour = f"C{shade}"
            panel.plot(runs.tokens[chosen], runs.increase[chosen], "o", color=colour, label=f"{size:.3g} parameters")
            grid = np.geomspace(runs.tokens.min(), runs.tokens.max(), 50)
            panel.plot(grid, law.increase(np.full_like(grid, size), grid), color=colour)
        panel.set(title=name, xlabel="fine-tuning tokens", xscale="log")
        panel.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("increase of the old loss (nats)")
    return png(figure)
