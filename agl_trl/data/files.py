"""Rows of files, of the Hub and of the package itself."""

import codecs
from collections.abc import Callable
from functools import partial
from pathlib import Path

from datasets import Dataset, load_dataset

from ..artifacts.files import first_line
from ..driftcaps import alignment_rows
from ..miniworld import MINIWORLD, alignment_dataset


READERS: dict[str, Callable[..., Dataset]] = {
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
    ".csv": Dataset.from_csv,
    ".tsv": partial(Dataset.from_csv, sep="\t"),
    ".txt": Dataset.from_text,  # a prompt a line
    ".parquet": Dataset.from_parquet,
}
# Marks at the beginning of a file, as Excel and Windows write them.
ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def is_file(name: str) -> bool:
    """Whether a name is that of a file with rows, there or not, and not of a dataset on the Hub."""
    path = Path(name)
    return path.suffix.lower() in READERS or path.is_file()


def load_rows(name: str, split: str = "train", config: str | None = None) -> Dataset:
    """
    Rows to protect, or to train on.

    Args:
        name (`str`):
            A `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` or `.txt` file (a prompt a line), a dataset on the Hub, or one of the
            package: `"miniworld"` gives the alignment rows of the embedded world, `"driftcaps"` those of DriftCaps.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a dataset on the Hub.
        config (`str`, *optional*):
            Its configuration.

    Raises:
        `ValueError`: If they can't be read, or there are none.
    """
    if name == MINIWORLD:
        return alignment_dataset()
    if name == "driftcaps":
        return alignment_rows()
    try:
        rows = _read(Path(name)) if is_file(name) else load_dataset(name, config, split=split)
    except Exception as error:  # datasets raises a different class for every format and every way to fail
        raise ValueError(f"Can't read rows from '{name}': {read_failure(error)}.") from error
    if not rows:
        raise ValueError(f"Can't read rows from '{name}': it holds no rows.")
    return rows


def read_text(name: str) -> str:
    """
    All of a `.txt` file, as one text.

    Raises:
        `ValueError`: If it can't be read, or holds nothing.
    """
    try:
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        text = path.read_text(encoding=_encoding(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"Can't read a text from '{name}': {read_failure(error)}.") from error
    if not text.strip():
        raise ValueError(f"Can't read a text from '{name}': it is empty.")
    return text


def _read(path: Path) -> Dataset:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"the name of the file must end in {', '.join(list(READERS)[:-1])} or {list(READERS)[-1]}")
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    options = {} if reader is Dataset.from_parquet else {"encoding": _encoding(path)}
    rows = reader(str(path), **options)
    if reader is Dataset.from_text:
        rows = rows.rename_column("text", "prompt")
        return rows.select([i for i, prompt in enumerate(rows["prompt"]) if prompt.strip()])
    return rows.rename_columns({column: column.strip() for column in rows.column_names})


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(3)
    encoding = next((name for mark, name in ENCODINGS.items() if start.startswith(mark)), "utf-8")
    with path.open(encoding=encoding) as lines:  # Arrow would tell wrong bytes only when the row is used
        for _ in lines:
            pass
    return encoding


def read_failure(error: Exception) -> str:
    """Why `datasets` could not read a source, as [`first_line`] tells it."""
    cause = error.__cause__ or error
    of_empty = ("corresponds to no data", "Please pass `features` or at least one example")  # datasets on empty files
    if isinstance(cause, StopIteration) or any(part in str(cause) for part in of_empty):
        return "it holds no rows"
    return first_line(cause)
