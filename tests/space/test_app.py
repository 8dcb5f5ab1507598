"""The app as a whole: what names its models, where it runs, and what it says without Gradio."""

import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from agl_trl.cli.space import write_space
from agl_trl.space import build_app
from agl_trl.space.models import ADAPTERS


ROOT = Path(__file__).parents[2]
IMPORTED = """
import ast, sys
from pathlib import Path
import app
assert app.app.blocks and "agl-panes" in str(app.app.get_config_file())
roots = set()
for name, module in [*sys.modules.items()]:
    if name.partition(".")[0] == "agl_trl":
        assert Path(module.__file__).is_relative_to(Path.cwd()), module.__file__
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.Import):
                roots |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                roots.add(node.module)
print(*{root.partition(".")[0] for root in roots} - {*sys.stdlib_module_names})
"""


def run(*arguments: str, path: Path, cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, *arguments], check=False, capture_output=True, text=True, env=environment, cwd=cwd
    )


def test_variables_name_the_models(monkeypatch):
    monkeypatch.setenv("ADAPTER", str(ADAPTERS / "plain"))
    assert "agl-of-2" in str(build_app().get_config_file())
    monkeypatch.setenv("ADAPTER", "nobody/nothing")
    with pytest.raises(ValueError, match="Can't read 'nobody/nothing'"):
        build_app()


def test_all_files_of_the_app_travel_with_a_space(tmp_path):
    write_space(tmp_path, [])

    def files(root: Path) -> set[Path]:
        found = {path.relative_to(root) for path in (root / "agl_trl" / "space").rglob("*") if path.is_file()}
        return {path for path in found if "__pycache__" not in path.parts}

    assert files(tmp_path) == files(ROOT) and any(path.suffix == ".jinja" for path in files(ROOT))


@pytest.mark.slow  # a Python that imports all of it: the copy has to be the one that runs
def test_a_space_runs_from_its_own_files_and_requirements(tmp_path):
    write_space(tmp_path, [])
    ended = run("-c", IMPORTED, path=tmp_path, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    listed = {re.split("[<>=]", line)[0] for line in (tmp_path / "requirements.txt").read_text().splitlines()[1:]}
    # bitsandbytes is imported for 4-bit models alone, which no Space loads; Gradio comes with the Space.
    assert {name.replace("_", "-") for name in ended.stdout.split()} - {"bitsandbytes", "gradio"} == listed
    assert all(distribution(name) for name in listed)


def test_without_gradio_one_sentence_names_the_extra(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['gradio'] = None")
    (tmp_path / "agl_trl").symlink_to(ROOT / "agl_trl")
    ended = run("-m", "agl_trl", "space", path=tmp_path, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (
        2,
        "agl-trl: Comparisons in the browser need gradio: pip install 'agl-trl[space]'.\n",
    )
