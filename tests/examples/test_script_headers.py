"""Scripts that bring their own environment (PEP 723): `uv run` and Jobs of the Hub read their header and nothing else."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEADER = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")  # the PEP's own
SCRIPTS = ["sft", "dpo", "grpo", "kto", "quickstart"]


def header(script: Path) -> dict:
    """Metadata of a script, read as the PEP says."""
    (found,) = [match for match in HEADER.finditer(script.read_text()) if match["type"] == "script"]
    lines = found["content"].splitlines(keepends=True)
    return tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))


def brought(requirement: Requirement) -> set[str]:
    """Distributions that a requirement on this package brings, itself included."""
    extras = PROJECT["optional-dependencies"]
    assert requirement.extras <= extras.keys()
    listed = [*PROJECT["dependencies"], *(line for extra in requirement.extras for line in extras[extra])]
    return {PROJECT["name"], *(canonicalize_name(Requirement(line).name) for line in listed)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_header_agrees_with_the_project_and_brings_what_is_imported(name):
    script = ROOT / "examples" / f"{name}.py"
    told = header(script)
    assert told["requires-python"] == PROJECT["requires-python"]
    (requirement,) = map(Requirement, told["dependencies"])
    assert requirement.name == PROJECT["name"]
    source = told["tool"]["uv"]["sources"][PROJECT["name"]]  # in a checkout: the checkout
    assert source["editable"] and (script.parent / source["path"]).resolve() == ROOT
    nodes = [*ast.walk(ast.parse(script.read_text()))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    roots = {name.partition(".")[0] for name in imported} - {*sys.stdlib_module_names}
    names = packages_distributions()
    for root in roots:
        assert {canonicalize_name(found) for found in names.get(root, [root.replace("_", "-")])} & brought(requirement)


def test_no_other_example_has_a_header_that_nobody_tests():
    found = {path.stem for path in (ROOT / "examples").glob("*.py") if "# /// script" in path.read_text()}
    assert found == {*SCRIPTS}
