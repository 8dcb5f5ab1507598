"""
What works with which versions: an environment for every file in `constraints/`, and in it every check of `checks.py`.

    make matrix                                   # or
    python -m tests.matrix --columns llama-factory --columns ms-swift

Writes `matrix.md` and logs; what has passed is not tried again. An environment is made anew where its constraints
or `pyproject.toml` change.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer


ROOT = Path(__file__).parents[2]
CONSTRAINTS = Path(__file__).parent / "constraints"
COLUMNS = [path.stem.removeprefix("constraints-") for path in sorted(CONSTRAINTS.glob("*.txt"))]
CHECKS = ["import", "SFT", "DPO", "callback", "drift", "fisher", "resume", "hooks"]
PACKAGES = ("trl", "transformers", "datasets", "peft", "huggingface-hub", "torch")
VERSIONS = (
    f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {PACKAGES}}}))"
)


def environment(column: str, folder: Path, shared: Path | None) -> Path:
    """Python of the environment of a column, which is made where it is missing or out of date."""
    constraints = CONSTRAINTS / f"constraints-{column}.txt"
    wanted = hashlib.sha256(constraints.read_bytes() + (ROOT / "pyproject.toml").read_bytes()).hexdigest()
    mark, python = folder / "made-of", folder / "bin" / "python"
    if not mark.is_file() or mark.read_text() != wanted:
        print(f"{column}: makes its environment", file=sys.stderr)
        mark.unlink(missing_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        if shared is not None:  # behind the environment's own packages
            (site,) = (folder / "lib").glob("python*/site-packages")
            (site / "shared.pth").write_text(f"{shared.absolute()}\n")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-c", constraints, "-e", f"{ROOT}[report]", "pytest"], check=True)
        mark.write_text(wanted)
    return python


def check(python: Path, names: list[str], folder: Path) -> Iterator[dict[str, str]]:
    """Make checks, and tell as each ends what came of it: `passes`, `fails`, or which TRL it needs."""
    settings = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CI="1")
    command = [python, "-m", "tests.matrix.checks", folder, *names]
    with (
        open(folder / "checks.log", "w") as log,
        subprocess.Popen(command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        yield from (json.loads(line) for line in process.stdout if line.startswith('{"'))


def table(results: dict[str, dict]) -> str:
    """All results so far as Markdown, a line for every column of versions."""
    lines = [f"| set | {' | '.join([*PACKAGES, *CHECKS])} |", "|---" * (1 + len(PACKAGES) + len(CHECKS)) + "|"]
    for column, found in results.items():
        versions, checks = found["versions"], found["checks"]
        cells = [versions[name] for name in PACKAGES] + [checks.get(name, "fails") for name in CHECKS]
        lines.append(f"| {column} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(
    columns: Annotated[list[str], typer.Option(help=f"Sets of versions, of {', '.join(COLUMNS)}.")] = COLUMNS,
    output_dir: Annotated[Path, typer.Option(help="Folder for environments, logs and table.")] = Path(
        "outputs/matrix"
    ),
    share_site_packages: Annotated[
        Path | None,
        typer.Option(help="Folder with an installed torch that the environments take in place of their own."),
    ] = None,
) -> None:
    if unknown := {*columns} - {*COLUMNS}:
        raise typer.BadParameter(f"There is no set {', '.join(sorted(unknown))}: choose of {', '.join(COLUMNS)}.")
    output_dir.mkdir(parents=True, exist_ok=True)
    file = output_dir / "matrix.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    for column in columns:
        folder = (output_dir / column).absolute()
        python = environment(column, folder / "venv", share_site_packages)
        versions = json.loads(subprocess.run([python, "-c", VERSIONS], check=True, capture_output=True).stdout)
        found = results.setdefault(column, {"checks": {}})
        if found.get("versions") != versions:
            results[column] = found = {"checks": {}, "versions": versions}
        done = found["checks"]
        for result in check(python, [name for name in CHECKS if done.get(name) in (None, "fails")], folder):
            done |= result
            print(column, result, file=sys.stderr)
            file.write_text(json.dumps(results, indent=1))
    written = table(results)
    (output_dir / "matrix.md").write_text(written)
    print(written)
    if any(found["checks"].get(name, "fails") == "fails" for found in results.values() for name in CHECKS):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
