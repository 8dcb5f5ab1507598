"""Tensors and their metadata as safetensors files: written whole or not at all, read with a reason when refused."""

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


SCHEMA_VERSION = 2  # 1 said damping for shrinkage
CHECKSUM = "content_sha256"
DEEPEST = 10  # levels of metadata
LONGEST_REASON = 160  # characters
ADAPTER_FILE = "adapter_model.safetensors"
FOLDER = "agl"  # next to it
FISHER_FILE = "fisher.safetensors"
DRIFT_FILE = "drift.safetensors"
REFERENCE_ANSWERS_FILE = "reference_answers.safetensors"
PICTURE_FILE = "drift.png"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt"),
)
TAG = "alignguard-lora"  # of models and cards on the Hub


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
        raise OSError(error.errno, f"Cannot write '{path}': {error.strerror or first_line(error)}.") from error


def check_writable(folder: Path) -> None:
    """
    Check that a file can be written to a folder, before there is anything to write. Nothing is left behind: a folder that
    is not there is made and removed again.

    Raises:
        `OSError`: With one sentence naming folder and reason.
    """
    made = []
    try:
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            error.errno, f"Cannot write to the folder '{folder}': {error.strerror or first_line(error)}."
        ) from error
    finally:
        for place in made:
            with suppress(OSError):  # it was not made after all, or somebody else uses it by now
                place.rmdir()


def check_file(path: Path) -> None:
    """
    Check that a file of this name can be written, before there is anything to write.

    Raises:
        `OSError`: With one sentence naming it and the reason.
    """
    if path.is_dir():
        raise OSError(f"Cannot write '{path}': it is a folder; name a file in it.")
    check_writable(path.parent)


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
            JSON-serialisable; `schema_version` and `content_sha256` are added.

    Raises:
        `OSError`: If the file can't be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    described = {"schema_version": SCHEMA_VERSION, **metadata}
    header = {"agl": canonical_json({**described, CHECKSUM: content_sha256(contiguous, described)})}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="_") as folder:
            temporary = Path(folder) / path.name
            save_file(contiguous, temporary, metadata=header)
            temporary.chmod(0o644)
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise OSError(f"Cannot write '{path}': {reason}.") from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """
    Tensors and metadata of a file that [`save_tensors`] wrote, without its checksum. Nothing in it is unpickled or executed.

    Raises:
        [`ArtifactError`]: If the file is missing, is not a readable safetensors file, was not written by this package, or by a
            newer version of it, or is not what was written.
    """
    if not path.is_file():
        raise ArtifactError(f"There is no file '{path}'.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _read_metadata(path, (file.metadata() or {}).get("agl"))
            # Copied out of the mapped file, which may be overwritten or cut while they are in use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except ArtifactError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' is not a readable safetensors file ({first_line(error)}).") from error
    checksum = metadata.pop(CHECKSUM, None)
    if checksum is not None and checksum != content_sha256(tensors, metadata):  # of early files, none
        raise ArtifactError(f"'{path}' is damaged: its content is not what was written; get it again.")
    return tensors, metadata


def _read_metadata(path: Path, header: str | None) -> dict[str, Any]:
    if header is None:
        raise ArtifactError(f"'{path}' was not written by agl_trl: it has no 'agl' metadata.")
    unreadable = f"The 'agl' metadata of '{path}' can't be read"
    try:
        metadata = json.loads(header)
        if not isinstance(metadata, dict) or "schema_version" not in metadata:
            raise ArtifactError(f"{unreadable}: it names no schema version.")
        version = metadata["schema_version"]
        if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:  # True is an int too
            told = ascii(version)
            told = told if len(told) <= 20 else f"{told[:20]}…"
            raise ArtifactError(
                f"'{path}' has schema version {told}; this agl_trl reads up to {SCHEMA_VERSION}: upgrade it."
            )
        # As it was written: no NaN, no key twice, nothing that can't be written again.
        if canonical_json(metadata).encode() != header.encode() or not _is_flat(metadata):
            raise ArtifactError(f"{unreadable}: it is not as agl_trl writes it.")
    except ArtifactError:
        raise
    except (ValueError, RecursionError) as error:  # among them numbers of too many digits and lone surrogates
        raise ArtifactError(f"{unreadable} ({first_line(error)}).") from error
    return metadata


def _is_flat(value: Any) -> bool:
    """Whether JSON is nested no deeper than anything we write, so that no walk through it runs out of stack."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return not level


def content_sha256(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """Hexadecimal SHA-256 over metadata and tensors: names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256(canonical_json(metadata).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """What a library says, as it may stand in a sentence of ours: one line, short, without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:LONGEST_REASON].rstrip(".: ")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
