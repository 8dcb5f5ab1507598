"""Where an artifact or an adapter is: a file, a folder, or a repo on the Hub, with a sentence for every way not to find it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .files import ADAPTER_FILE, FOLDER, TOKENIZER_FILES, ArtifactError, first_line


def hub_id(name: Any, *, with_owner: bool = False) -> str | None:
    """
    A name, if a repo on the Hub could have it as its id.

    Args:
        name (`Any`):
            What may be an id, a path, or nothing at all.
        with_owner (`bool`, *optional*, defaults to `False`):
            Whether only an id such as `user/name` counts, as all repos but a few early ones have it.

    Returns:
        `str`, *optional*: The name, or none for what can't be an id. A folder of this name may be there all the same.
    """
    if not isinstance(name, str) or not name.isascii() or (with_owner and "/" not in name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def find_artifact(
    location: str | os.PathLike, name: str, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """
    Path of an artifact given the file itself, its folder, the folder of the adapter it belongs to, or the id of a repo on
    the Hub (`user/name`), of which this one file is downloaded, or taken from the cache.

    Args:
        location (`str` or `os.PathLike`):
            Where to look.
        name (`str`):
            Name of the file.
        revision (`str`, *optional*):
            Branch, tag or commit of the repo.
        token (`str` or `bool`, *optional*):
            Token for a private or gated repo; by default the one that is logged in.

    Raises:
        [`ArtifactError`]: If it is in none of these places.
    """
    path = Path(location)
    candidates = [path] if path.is_file() else [path / FOLDER / name, path / name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.exists() or hub_id(str(location), with_owner=True) is None:
        raise ArtifactError(f"Found no '{FOLDER}/{name}' in '{location}'.")
    return Path(from_hub(hf_hub_download, str(location), f"{FOLDER}/{name}", revision=revision, token=token))


def adapter_folder(location: str | os.PathLike, revision: str | None = None) -> Path:
    """
    Folder of an adapter given itself, or the id of its repo on the Hub, of which it is downloaded with evidence and tokenizer.

    Raises:
        [`ArtifactError`]: If there is none.
    """
    path = Path(location)
    if not path.exists() and hub_id(str(location), with_owner=True) is not None:
        patterns = ["adapter_config.json", ADAPTER_FILE, f"{FOLDER}/*", "README.md", *TOKENIZER_FILES]
        path = Path(from_hub(snapshot_download, str(location), revision=revision, allow_patterns=patterns))
    if not (path / ADAPTER_FILE).is_file():
        raise ArtifactError(f"There is no adapter in '{location}': '{ADAPTER_FILE}' is missing.")
    return path


def from_hub(download: Callable[..., Any], repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """
    Call a download function of the Hub's client.

    Raises:
        [`ArtifactError`]: One sentence for every way to fail.
    """
    try:
        return download(repo_id, *args, **kwargs)
    except GatedRepoError as error:
        reason = f"it is gated: accept its terms at {constants.ENDPOINT}/{repo_id} and log in with `hf auth login`"
        raise ArtifactError(f"Can't read '{repo_id}': {reason}.") from error
    except RepositoryNotFoundError as error:
        reason = "there is no such folder, and no such repo on the Hub, or it is private (log in with `hf auth login`)"
        raise ArtifactError(f"Can't read '{repo_id}': {reason}.") from error
    except RevisionNotFoundError as error:
        raise ArtifactError(f"'{repo_id}' has no revision '{kwargs.get('revision')}'.") from error
    except RemoteEntryNotFoundError as error:
        raise ArtifactError(f"'{repo_id}' has no file '{args[0]}'.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = "there is no such folder, it isn't in the cache, and the Hub can't be reached"
        raise ArtifactError(f"Can't read '{repo_id}': {reason}.") from error
    except (HfHubHTTPError, OSError) as error:
        raise ArtifactError(f"Can't read '{repo_id}': {first_line(error)}.") from error


def shown_name(name: str) -> str:
    """A name as a report may tell it: of a file or folder without those around it, so that no path of a machine is told."""
    return Path(name).resolve().name if Path(name).exists() else name
