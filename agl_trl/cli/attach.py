"""What `agl-trl attach` does."""

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import typer

from ..artifacts.files import (
    DRIFT_FILE,
    FISHER_FILE,
    FOLDER,
    PICTURE_FILE,
    ArtifactError,
    check_writable,
)
from ..artifacts.location import adapter_folder
from ..drift.plots import plot_drift
from ..drift.report import DriftReport
from ..fisher.statistics import FisherStatistics
from ..hub.model_card import attach_card
from ..hub.push import files_to_push, push_folder
from .drift import drift
from .drift_written import ANSWERS_FILE


OF_TRAINING = ("coefficients", "protected")  # in the metadata of a report


def attach(
    *,
    adapter: str,
    base: str,
    fisher: str | None,
    prompts: str | None,
    limit: int | None,
    judge: str,
    ability: Sequence[str] = (),
    ability_limit: int | None = None,
    create_pr: bool,
    max_new_tokens: int,
    batch_size: int,
) -> None:
    """
    Measure an adapter, and add report, statistics that were named, picture and card to its folder, or to its repo in one commit
    that builds on the very commit that was measured. Statistics that had to be estimated for it are not kept.

    Args:
        adapter (`str`):
            Folder or Hub id of the adapter.
        create_pr (`bool`):
            Whether to open a pull request in its repo, in place of a commit.
        base, fisher, prompts, limit, judge, ability, ability_limit, max_new_tokens, batch_size:
            As in [`drift`].

    Raises:
        `ValueError`: For what [`drift`] refuses.
        `OSError`: If the folder can't be written.
        [`PushError`]: If the repo can't be written.
    """
    from_hub = not Path(adapter).exists()
    if create_pr and not from_hub:
        raise ValueError("`--create-pr` is for an adapter on the Hub; this one is a folder.")
    source = adapter_folder(adapter)
    name = adapter.rstrip("/").split("/")[-1]
    answers = Path(f"{name}-{ANSWERS_FILE}")
    if from_hub and prompts is not None:
        check_writable(answers.parent)
    with ExitStack() as stack:
        folder = source
        if from_hub:  # measured in a copy: the cache is not ours to write
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / name
            shutil.copytree(source, folder)
        trained = _report_of_training(folder)
        with_its_own = fisher is None and (folder / FOLDER / FISHER_FILE).is_file()
        drift(
            base=base,
            output_dir=folder,
            adapter=str(folder),
            fisher=fisher,
            prompts=prompts,
            limit=limit,
            judge=judge,
            ability=ability,
            ability_limit=ability_limit,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        report = DriftReport.from_pretrained(folder)
        if trained is not None:  # what only the run could measure stays
            report.global_step, report.budget_multiplier = trained.global_step, trained.budget_multiplier
            report.metadata |= {name: trained.metadata[name] for name in OF_TRAINING if name in trained.metadata}
            if with_its_own:  # in the same metric
                report.history = trained.history
            else:
                (report.metadata.get("coefficients") or {}).pop("drift_budget", None)
            report.save_pretrained(folder)
            plot_drift(report, folder / FOLDER / PICTURE_FILE)
        if fisher is not None and report.layers:
            FisherStatistics.from_pretrained(fisher).save_pretrained(folder)
        attach_card(
            folder / "README.md",
            name,
            report,
            base_model=base,
            repo_id=adapter if from_hub else None,
        )
        if not from_hub:
            typer.echo(f"Report and card are in {folder}; `agl-trl push {folder} USER/NAME` publishes them.")
            return
        if (folder / ANSWERS_FILE).is_file():
            shutil.copy2(folder / ANSWERS_FILE, answers)  # stays here: it may say what nobody should read
        files = [path for path in files_to_push(folder) if path == "README.md" or path.startswith(f"{FOLDER}/")]
        commit = push_folder(
            folder,
            adapter,
            message="Drift report and card",
            files=files,
            parent_commit=source.name,  # the snapshot that was measured: a newer adapter is never given this report
            create_pr=create_pr,
        )
        typer.echo(commit.pr_url or commit.commit_url)


def _report_of_training(folder: Path) -> DriftReport | None:
    """
    The report that the run of this very adapter has left beside it; none of an adapter that went on from another one, whose drift
    and KL are from there and not from the base model.
    """
    if not (folder / FOLDER / DRIFT_FILE).is_file():
        return None
    try:
        report = DriftReport.from_pretrained(folder)
        report.check_describes(folder)
    except ArtifactError:  # `drift` tells it
        return None
    return None if report.metadata.get("continued") else report
