"""Lower bounds are what is tried: the oldest version of every library in the sets that `make matrix` installs."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from agl_trl.artifacts import extras


ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tests" / "matrix" / "constraints").glob("constraints-*.txt"))
# Whose versions front ends fix; TRL's own bound is that of our trainers, below which the callback works still.
CHOSEN = ["accelerate", "datasets", "huggingface-hub", "peft", "tokenizers", "transformers", "trl"]


def pins(file: Path) -> dict[str, Version]:
    """Versions of a set by the name of the library."""
    lines = (line.partition("==") for line in file.read_text().splitlines() if not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, _, version in lines}


def declared() -> dict[str, Requirement]:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return {canonicalize_name(found.name): found for found in map(Requirement, listed)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_set_fixes_the_same_libraries_within_the_bounds(file):
    found, wanted = pins(file), declared()
    assert found.keys() >= {*CHOSEN}
    assert all(version in wanted[name].specifier for name, version in found.items())


@pytest.mark.parametrize("name", CHOSEN)
def test_lower_bound_is_the_oldest_that_is_tried(name):
    (lower,) = [Version(part.version) for part in declared()[name].specifier if part.operator == ">="]
    oldest = min(pins(file)[name] for file in FILES)
    assert lower.release == oldest.release[: len(lower.release)] and oldest.release[len(lower.release) :] in ((), (0,))


def test_trainers_ask_for_the_oldest_trl_with_which_they_are_tried():
    tried = [pins(file)["trl"] for file in FILES]
    assert min(version for version in tried if version >= Version(extras.TRL)) == Version(extras.TRL)


def test_trainers_say_which_trl_they_need(monkeypatch):
    for found, refused in (
        ("1.8.2", True),
        ("0.24.0", True),
        ("1.9.0", False),
        ("1.10rc1", False),
        ("1.16.0rc1", False),
        ("2.0", False),
    ):
        monkeypatch.setattr(extras, "version", lambda name, found=found: found)
        if refused:
            with pytest.raises(
                extras.MissingExtra, match=rf"^The trainers need TRL 1.9 or newer, and {re.escape(found)} is"
            ):
                extras.needs_trl("The trainers")
        else:
            extras.needs_trl("The trainers")
