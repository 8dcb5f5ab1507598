"""The house: a folder per concept, and imports that go one way."""

import ast
from pathlib import Path


PACKAGE = Path(__file__).parents[1] / "agl_trl"
# A folder may import from those on earlier floors alone; those of one floor do not know each other.
FLOORS = (
    {"objective", "artifacts", "miniworld", "driftcaps"},
    {"data"},
    {"modeling"},
    {"fisher", "evaluation"},
    {"drift", "screening"},
    {"hub"},
    {"trainer"},
    {"experiments"},
    {"scripts", "space", "integrations"},
    {"cli"},
)
FLOOR = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
# What runs as a program of its own stands on top of the house: it makes what its folder ships.
PROGRAMS = {"miniworld/build.py", "space/build.py"}
TORCH_ALONE = {"torch", "collections", "contextlib", "dataclasses", "typing", "math"}


def imported(path: Path) -> list[tuple[str, int]]:
    """Dotted names of what a file imports from anywhere, relative ones made absolute, with their lines."""
    package = ["agl_trl", *path.relative_to(PACKAGE).parts[:-1]]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            names += [(f"{module}.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [(alias.name, node.lineno) for alias in node.names]
    return names


def folder_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "agl_trl" and len(parts) > 1 and parts[1] in FLOOR else None


def test_no_module_lies_flat_and_every_folder_has_a_floor():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == {*FLOOR}


def test_arrows_between_folders_go_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE)
        if len(place.parts) == 1 or place.as_posix() in PROGRAMS:
            continue
        for name, line in imported(path):
            other, own = folder_of(name), place.parts[0]
            if other is not None and other != own and FLOOR[other] >= FLOOR[own]:
                wrong.append(f"{place}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_modules():
    places = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.glob("*/*.py")}
    modules = {".".join(["agl_trl", *parts]).removesuffix(".__init__"): path for path, parts in places.items()}
    left: dict[str, set[str]] = {}
    for module, path in modules.items():
        # A name out of a module, or a module out of a folder.
        found = {name if name in modules else name.rpartition(".")[0] for name, _ in imported(path)}
        left[module] = (found & {*modules}) - {module}
    while free := {module for module, others in left.items() if not others & {*left}}:
        left = {module: others for module, others in left.items() if module not in free}
    assert not left, f"a circle of {', '.join(sorted(left))}"


def test_the_maths_imports_torch_alone():
    for path in (*(PACKAGE / "objective").glob("*.py"), PACKAGE / "screening" / "directions.py"):
        for name, line in imported(path):
            root = name.split(".")[0]
            assert root in TORCH_ALONE or folder_of(name) == "objective", f"{path.name}:{line} imports {name}"
