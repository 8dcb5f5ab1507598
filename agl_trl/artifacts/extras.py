"""Libraries that a part of the package needs: imported where they are used, with a sentence where they are missing or too old."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from packaging.version import Version


TRL = "1.9"  # the oldest whose trainers ours can extend; front ends that pin an older one take the callback, which needs none


class MissingExtra(ImportError):
    """A library that is not installed, or too old; the message names what brings it."""


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


def needs_trl(what: str) -> None:
    """
    Check that TRL is new enough for trainers that extend its own, before anything of it is imported.

    Args:
        what (`str`):
            What needs it: plural, and the beginning of a sentence, such as `"The AGL trainers"`.

    Raises:
        [`MissingExtra`]: One sentence, where it is too old.
    """
    found = version("trl")
    if Version(Version(found).base_version) < Version(TRL):
        raise MissingExtra(
            f"{what} need TRL {TRL} or newer, and {found} is installed: pip install 'trl>={TRL}', or use AlignGuardCallback, which needs none."
        )
