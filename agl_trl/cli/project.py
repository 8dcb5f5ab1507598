"""What `agl-trl project` does."""

from pathlib import Path

import typer

from ..artifacts.files import ADAPTER_FILE, FOLDER, PICTURE_FILE, ArtifactError, check_writable, sha256
from ..artifacts.location import adapter_folder
from ..drift.plots import plot_drift
from ..drift.projection import write_projected
from ..drift.report import DriftReport
from ..fisher.statistics import FisherStatistics
from ..modeling.loading import load_adapter, load_model
from ..modeling.lora import NoFactors, adapted_layers, linear_layers


def project(*, adapter: str, base: str, budget: float, output_dir: Path, fisher: str | None) -> None:
    """
    Write a copy of an adapter that is shrunk to a drift budget, with statistics, report and picture, and print what
    it drifted before and after.

    Args:
        adapter (`str`):
            Folder or Hub id of the adapter.
        base (`str`):
            Folder or Hub id of the base model, or `"miniworld"`.
        budget (`float`):
            Largest mean relative drift of the copy.
        output_dir (`Path`):
            Folder of the copy.
        fisher (`str`, *optional*):
            Folder or Hub id of Fisher statistics; by default the adapter's own.

    Raises:
        `ValueError`: If the budget is not above 0, the copy would overwrite the original, or something does not load or fit.
        `OSError`: If the copy can't be written.
    """
    if not budget > 0:
        raise ValueError(f"`--budget` must be above 0, got {budget}.")
    check_writable(output_dir)
    folder = adapter_folder(adapter)
    if output_dir.resolve() == folder.resolve():
        raise ArtifactError(f"The projected copy must not overwrite '{folder}': name another `--output-dir`.")

    statistics = FisherStatistics.from_pretrained(fisher or folder)
    model = load_adapter(load_model(base)[0], folder)
    try:
        layers = adapted_layers(model)
    except NoFactors as error:
        raise ValueError(
            f"Only the two factors of LoRA can be shrunk, which '{adapter}' does not have. {error}"
        ) from error
    if not layers:
        raise ValueError(f"Only LoRA on linear layers can be shrunk, and '{adapter}' has none.")
    statistics.check_fits(model, linear_layers(model))

    before = DriftReport.measure(model, statistics)
    strength = write_projected(folder, output_dir, model, statistics, budget)  # and the model has the file's weights
    after = DriftReport.measure(model, statistics)
    after.metadata["projected"] = {"budget": budget, "strength": strength, "drift_before": before.mean_relative_drift}
    after.adapter_sha256 = sha256(output_dir / ADAPTER_FILE)

    statistics.save_pretrained(output_dir)
    after.save_pretrained(output_dir)
    plot_drift(after, output_dir / FOLDER / PICTURE_FILE)
    typer.echo(f"before: relative drift {before.mean_relative_drift:.3e}")
    typer.echo(f"after:  relative drift {after.mean_relative_drift:.3e}, budget {budget:g}, in {output_dir}")
    if after.uncovered:
        names = ", ".join(sorted(after.uncovered))
        typer.echo(f"Note: the adapter also trained {names}; this is in no figure above and is in the copy as it was.")
