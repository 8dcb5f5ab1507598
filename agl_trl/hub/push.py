"""Pushing a folder to the Hub: adapter, evidence and card in one commit, or nothing."""

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from ..artifacts.files import (
    ADAPTER_FILE,
    DRIFT_FILE,
    FISHER_FILE,
    FOLDER,
    REFERENCE_ANSWERS_FILE,
    sha256,
)
from ..artifacts.upload import FAILURES, PushError, create_repo
from ..drift.report import DriftReport


# Names of files and folders, at any depth: temporary ones, and answers, which may say what nobody should read.
NEVER_PUSHED = ("_*", ".cache", ".git", "abilities.jsonl", "answers.jsonl", "*-answers.jsonl", "unfinished-*.jsonl")
# The arguments of a run as a pickle, in which any trainer but ours leaves the token.
TRAINING_ARGS = "training_args.bin"
REFERENCE = "ref"  # TRL's name for the frozen adapter that DPO trains against; PEFT saves it in a folder of this name
ADAPTER_FILES = ("adapter_config.json", ADAPTER_FILE)
CHECKPOINTS = ("checkpoint-*", "last-checkpoint/*")
CARD, UNNAMED = "README.md", "path/to/this/adapter"  # what a card calls an adapter that has no repo yet


def files_to_push(
    folder: str | Path, *, push_fisher: bool = True, push_reference_answers: bool = True, checkpoints: bool = False
) -> list[str]:
    """
    Files of a folder that go up, as sorted POSIX paths: no temporary ones, no answers, no frozen adapter that a DPO trainer
    saved beside the trained one, checkpoints where asked for.

    Args:
        folder (`str` or `Path`):
            Folder to push.
        push_fisher (`bool`, *optional*, defaults to `True`):
            Whether the statistics go up.
        push_reference_answers (`bool`, *optional*, defaults to `True`):
            Whether the reference answers go up; they hold rows, and never do without the statistics.
        checkpoints (`bool`, *optional*, defaults to `False`):
            Whether checkpoints go up.
    """
    folder = Path(folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    hidden = [] if checkpoints else [*CHECKPOINTS]
    if not push_fisher:
        hidden.append(f"*{FOLDER}/{FISHER_FILE}")
    if not (push_fisher and push_reference_answers):
        hidden.append(f"*{FOLDER}/{REFERENCE_ANSWERS_FILE}")
    adapters = {path.parent for path in map(PurePosixPath, names) if path.name in ADAPTER_FILES}
    frozen = tuple(f"{place}/" for place in adapters if place.name == REFERENCE and place.parent in adapters)
    return [
        name
        for name in names
        if not name.startswith(frozen)
        and not any(fnmatch(name, pattern) for pattern in hidden)
        and not any(fnmatch(part, pattern) for part in PurePosixPath(name).parts for pattern in NEVER_PUSHED)
    ]


def check_agreement(folder: str | Path) -> None:
    """
    Check that the report in a folder is of the adapter beside it.

    Raises:
        [`PushError`]: If it is of another one.
        [`ArtifactError`]: If the report can't be read.
    """
    folder = Path(folder)
    if (folder / ADAPTER_FILE).is_file() and (folder / FOLDER / DRIFT_FILE).is_file():
        told, found = DriftReport.from_pretrained(folder).adapter_sha256, sha256(folder / ADAPTER_FILE)
        if told is not None and told != found:
            raise PushError(
                f"The report in '{folder}' is of another adapter (sha256 {told[:8]}… there, {found[:8]}… here): measure again with "
                "`agl-trl attach`."
            )


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    files: list[str] | None = None,
    parent_commit: str | None = None,
    create_pr: bool = False,
    repo_type: str | None = None,
) -> CommitInfo:
    """
    Upload a folder to a repo in **one** commit, creating the repo if need be. Evidence of an earlier push that is not
    part of this one is removed in the same commit, so that nothing there describes another adapter; so are reference answers
    beside statistics that come without them. A card that was written before there was a repo gets its id on the way.

    Args:
        folder (`str` or `Path`):
            Folder to push.
        repo_id (`str`):
            Repo on the Hub.
        message (`str`):
            Title of the commit.
        private (`bool`, *optional*):
            Whether a repo that has to be created is private.
        revision (`str`, *optional*):
            Branch.
        token (`str`, *optional*):
            Token; by default the one that is logged in.
        files (`list[str]`, *optional*):
            POSIX paths in the folder; by default those of [`files_to_push`].
        parent_commit (`str`, *optional*):
            Commit on which this one must build.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to open a pull request.
        repo_type (`str`, *optional*):
            `"space"` for a Space that is there already.

    Raises:
        [`PushError`]: One sentence for every way to fail, with the repo left as it was.
        [`ArtifactError`]: If the report in the folder can't be read.
    """
    folder = Path(folder)
    if files is None:
        files = files_to_push(folder)
    if not files:
        raise PushError(f"There is nothing to push in '{folder}'.")
    check_agreement(folder)
    if repo_type is None and not create_pr:
        repo_id = create_repo(repo_id, private=private, token=token)
    api = HfApi(token=token)
    try:
        there = api.list_repo_files(repo_id, revision=revision, repo_type=repo_type)
        pushed = {str(Path(name).parent) for name in files if name.endswith(ADAPTER_FILE)}  # folders with an adapter
        without = {str(Path(name).with_name(REFERENCE_ANSWERS_FILE)) for name in files if name.endswith(FISHER_FILE)}
        stale = [n for n in there if n not in files and (_is_evidence_of(n, pushed) or n in without)]
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=_content(folder, name, repo_id)) for name in files]
            + [CommitOperationDelete(path_in_repo=name) for name in stale],
            commit_message=message,
            revision=revision,
            parent_commit=parent_commit,
            create_pr=create_pr,
            repo_type=repo_type,
        )
    except FAILURES as error:
        raise PushError.because(f"Can't push '{folder}' to '{repo_id}'", error) from error


def _content(folder: Path, name: str, repo_id: str) -> Path | bytes:
    """The file, or the text of the card with the id of the repo in the examples."""
    path = folder / name
    return path.read_bytes().replace(UNNAMED.encode(), repo_id.encode()) if name == CARD else path


def _is_evidence_of(name: str, folders: set[str]) -> bool:
    path = Path(name)
    return path.parent.name == FOLDER and str(path.parent.parent) in folders


def stage(
    output_dir: Path,
    checkpoint: Path,
    target: Path,
    subfolder: str | None,
    *,
    push_fisher: bool,
    push_reference_answers: bool,
) -> None:
    """
    Copy what a push from a checkpoint uploads, so that later saves can't change it underway: the files of the output
    folder with adapter and evidence of the checkpoint, and the whole checkpoint in a subfolder where the strategy asks for it.

    Args:
        output_dir (`Path`):
            Folder of the run, with the card.
        checkpoint (`Path`):
            Checkpoint just saved.
        target (`Path`):
            Empty folder on the same disk.
        subfolder (`str`, *optional*):
            Where the whole checkpoint goes in the repo.
        push_fisher, push_reference_answers (`bool`):
            As in [`files_to_push`].
    """
    evidence = dict(push_fisher=push_fisher, push_reference_answers=push_reference_answers)
    described = {name for name in files_to_push(checkpoint, **evidence) if _describes_weights(name)}
    for name in files_to_push(output_dir, **evidence):
        if not _describes_weights(name):
            _copy(output_dir / name, target / name)
    for name in described:
        _link(checkpoint / name, target / name)
    if subfolder is not None:
        for name in files_to_push(checkpoint, **evidence):
            _link(checkpoint / name, target / subfolder / name)


def _describes_weights(name: str) -> bool:
    return name.startswith(("adapter_", f"{FOLDER}/", TRAINING_ARGS)) or name.endswith(
        tuple(f"/{file}" for file in ADAPTER_FILES)
    )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


def _link(source: Path, target: Path) -> None:
    # A checkpoint is never written again, only removed: a second name for its files costs no space and outlives it.
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
