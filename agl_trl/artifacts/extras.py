"""Libraries that come with an extra of the package: imported where they are used, with a sentence where they are missing."""

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ImportError):
    """A library that is not installed; the message names the extra that brings it."""


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """
    Context manager around imports of libraries that only an extra brings.

    Args:
        extra (`str`):
            Name of the extra, as in `pip install 'agl-trl[report]'`.
        what (`str`):
            What needs them: plural, and the beginning of a sentence, such as `"Pictures"`.

    Raises:
        [`MissingExtra`]: One sentence, where a library is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "a library").partition(".")[0]
        raise MissingExtra(f"{what} need {library}: pip install 'agl-trl[{extra}]'.") from error
