"""What `agl-trl push` does."""

from pathlib import Path

import typer

from ..artifacts.files import ADAPTER_FILE, DRIFT_FILE, FOLDER
from ..artifacts.location import hub_id
from ..artifacts.upload import PushError
from ..drift.report import DriftReport
from ..hub.model_card import attach_card, is_to_be_written
from ..hub.push import TRAINING_ARGS, files_to_push, push_folder


def push(
    *,
    folder: Path,
    repo_id: str,
    private: bool,
    push_fisher: bool,
    push_reference_answers: bool,
    checkpoints: bool,
    revision: str | None,
) -> None:
    """
    Push an adapter with its evidence and card in one commit, and print the address of the commit. A card that somebody wrote
    stays as it is, and `training_args.bin` stays here, since it may hold a token.

    Args:
        folder (`Path`):
            Folder of the adapter.
        repo_id (`str`):
            Repo on the Hub.
        private (`bool`):
            Whether a repo that has to be created is private.
        push_fisher (`bool`):
            Whether the statistics go up.
        push_reference_answers (`bool`):
            Whether the reference answers go up with them.
        checkpoints (`bool`):
            Whether the checkpoints in the folder go up.
        revision (`str`, *optional*):
            Branch.

    Raises:
        [`PushError`]: If there is no adapter with a report in the folder, and as in [`push_folder`].
    """
    if not folder.is_dir():
        raise PushError(f"There is no folder '{folder}'.")
    if not any(Path(name).name == ADAPTER_FILE for name in files_to_push(folder)):
        raise PushError(f"There is no adapter in '{folder}' (checkpoints aside): '{ADAPTER_FILE}' is missing.")
    if not (folder / FOLDER / DRIFT_FILE).is_file():
        raise PushError(f"There is no report in '{folder}': measure the adapter first with `agl-trl attach`.")
    card = folder / "README.md"
    # So that it tells what goes up this time.
    if not card.is_file() or is_to_be_written(card.read_text(encoding="utf-8")):
        attach_card(
            card,
            repo_id.split("/")[-1],
            DriftReport.from_pretrained(folder),
            repo_id=hub_id(repo_id, with_owner=True),
            statistics_published=push_fisher,
            references_published=push_fisher and push_reference_answers,
        )
    files = [
        name
        for name in files_to_push(
            folder, push_fisher=push_fisher, push_reference_answers=push_reference_answers, checkpoints=checkpoints
        )
        if Path(name).name != TRAINING_ARGS  # whose run it is of is not known without unpickling it
    ]
    commit = push_folder(
        folder,
        repo_id,
        message=f"Adapter with its drift report, {len(files)} files",
        private=private or None,
        revision=revision,
        files=files,
    )
    typer.echo(commit.commit_url)
