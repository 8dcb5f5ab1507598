"""Tensors and their metadata as safetensors files: written whole or not at all, read with a reason when refused."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


SCHEMA_VERSION = 1
ADAPTER_FILE = "adapter_model.safetensors"
FOLDER = "agl"  # next to it
FISHER_FILE = "fisher.safetensors"
DRIFT_FILE = "drift.safetensors"
PICTURE_FILE = "drift.png"
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class ArtifactError(ValueError):
    """A file that is missing, broken, foreign or of another model; the message says which and what to do."""


def canonical_json(value: Any) -> str:
    """JSON that is the same for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def write_atomically(path: Path, content: bytes) -> None:
    """
    Write a file under a temporary name and rename it, so that nobody ever reads half of it.

    Raises:
        `OSError`: With one sentence naming file and reason; the previous file, if any, is left as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix="_", suffix=path.suffix, delete=False) as file:
            temporary = file.name
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise OSError(error.errno, f"Cannot write '{path}': {error.strerror or error}.") from error


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """
    Save tensors with their metadata as canonical JSON under the single key `agl` (a second key would make the bytes of
    the file depend on a hash order).

    Args:
        path (`Path`):
            File to write.
        tensors (`dict[str, Tensor]`):
            Tensors by name.
        metadata (`dict`):
            JSON-serialisable; `schema_version` is added.

    Raises:
        `OSError`: If the file can't be written.
    """
    header = {"agl": canonical_json({"schema_version": SCHEMA_VERSION, **metadata})}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="_") as folder:
            temporary = Path(folder) / path.name
            save_file(contiguous, temporary, metadata=header)
            temporary.chmod(0o644)
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OSError(f"Cannot write '{path}': {reason}.") from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """
    Tensors and metadata of a file that [`save_tensors`] wrote. Nothing in it is unpickled or executed.

    Raises:
        [`ArtifactError`]: If the file is missing, is not a readable safetensors file, was not written by this package, or by a
            newer version of it.
    """
    if not path.is_file():
        raise ArtifactError(f"There is no file '{path}'.")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("agl")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' is not a readable safetensors file ({error}).") from error
    if header is None:
        raise ArtifactError(f"'{path}' was not written by agl_trl: it has no 'agl' metadata.")
    try:
        metadata = json.loads(header)
        version = metadata["schema_version"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ArtifactError(f"The 'agl' metadata of '{path}' can't be read ({error!r}).") from error
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ArtifactError(
            f"'{path}' has schema version {version!r}; this agl_trl reads up to {SCHEMA_VERSION}: upgrade it."
        )
    return tensors, metadata


def find_artifact(location: str | os.PathLike, name: str, revision: str | None = None) -> Path:
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

    Raises:
        [`ArtifactError`]: If it is in none of these places.
    """
    path = Path(location)
    candidates = [path] if path.is_file() else [path / FOLDER / name, path / name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.exists() or not REPO_ID.fullmatch(str(location)):
        raise ArtifactError(f"Found no '{FOLDER}/{name}' in '{location}'.")
    return Path(from_hub(hf_hub_download, str(location), f"{FOLDER}/{name}", revision=revision))


def adapter_folder(location: str | os.PathLike, revision: str | None = None) -> Path:
    """
    Folder of an adapter given itself, or the id of its repo on the Hub, of which adapter and evidence are downloaded.

    Raises:
        [`ArtifactError`]: If there is none.
    """
    path = Path(location)
    if not path.exists() and REPO_ID.fullmatch(str(location)):
        patterns = ["adapter_config.json", ADAPTER_FILE, f"{FOLDER}/*", "README.md"]
        path = Path(from_hub(snapshot_download, str(location), revision=revision, allow_patterns=patterns))
    if not (path / ADAPTER_FILE).is_file():
        raise ArtifactError(f"There is no adapter in '{location}': '{ADAPTER_FILE}' is missing.")
    return path


def from_hub(download: Callable[..., str], repo_id: str, *args: Any, **kwargs: Any) -> str:
    """
    Call a download function of the Hub's client.

    Raises:
        [`ArtifactError`]: One sentence for every way to fail.
    """
    try:
        return download(repo_id, *args, **kwargs)
    except GatedRepoError as error:
        reason = f"it is gated: accept its terms at https://huggingface.co/{repo_id} and log in with `hf auth login`"
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
        raise ArtifactError(f"Can't read '{repo_id}': {str(error).splitlines()[0].rstrip('.')}.") from error


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
