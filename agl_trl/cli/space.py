"""What `agl-trl space` does: the app on this machine, or as a Space on the Hub."""

import shutil
import tempfile
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path

import typer
from huggingface_hub import HfApi, constants

from ..artifacts.location import hub_id
from ..artifacts.upload import FAILURES, PushError, create_repo
from ..hub.push import push_folder


TEMPLATE = "agl_trl.space_template"  # spaces/refusal_comparison of the repository
# The package travels with the Space: it runs the very code that was tried here, and no index has to have it.
PACKAGE = Path(__file__).parents[1]
# Compiled files, the embedded model before its alignment, and the sizes that only the scaling law is measured on.
LEFT_OUT = ("__pycache__", "base", "base-*", "aligned-*")
UPGRADE = "creating Gradio Spaces on free CPU hardware needs a paid plan; free accounts may have ZeroGPU ones: `--hardware zero-a10g`"


def serve(*, base: str | None, adapter: str | None, port: int | None) -> None:
    """
    Run the app on this machine until it is interrupted.

    Args:
        base (`str`, *optional*):
            Folder or Hub id of the base model; by default the adapter's.
        adapter (`str`, *optional*):
            Folder or Hub id of the adapter; by default those of the package.
        port (`int`, *optional*):
            Port; by default the first free one.

    Raises:
        `ValueError`: If the models don't load.
    """
    from ..space import build_app, launch_options

    typer.echo("Loading the models…")
    build_app(base, adapter).launch(server_name="127.0.0.1", server_port=port, **launch_options())


def deploy(
    repo_id: str, *, base: str | None, adapter: str | None, private: bool = False, hardware: str | None = None
) -> str:
    """
    Create or update a Space: variables, and front matter, requirements, app and package in one commit.

    Args:
        repo_id (`str`):
            Id of the Space.
        base (`str`, *optional*):
            Hub id of the base model.
        adapter (`str`, *optional*):
            Hub id of the adapter.
        private (`bool`, *optional*, defaults to `False`):
            Whether a Space that has to be created is private.
        hardware (`str`, *optional*):
            Hardware of a Space that has to be created.

    Returns:
        `str`: Its address.

    Raises:
        `ValueError`: If base or adapter is no repo on the Hub, where a Space would have to find it.
        [`PushError`]: If the Hub refuses; a Space that was there keeps its files.
    """
    for name in (base, adapter):
        if name and name != "miniworld" and (not hub_id(name, with_owner=True) or Path(name).exists()):
            raise ValueError(
                f"A Space can't read '{name}' from this machine: push it and give its id, such as user/name."
            )
    if base and not adapter:
        raise ValueError("Give `--adapter` too: a base model alone is nothing to compare.")
    try:
        repo_id = create_repo(
            repo_id, private=private or None, repo_type="space", space_sdk="gradio", space_hardware=hardware
        )
    except PushError as error:
        if error.status != HTTPStatus.PAYMENT_REQUIRED:
            raise
        raise PushError(f"Can't create the Space '{repo_id}': {UPGRADE}.", error.status) from error
    with tempfile.TemporaryDirectory() as folder:
        write_space(Path(folder), [name for name in (base, adapter) if name and name != "miniworld"])
        _set_variables(repo_id, {"BASE_MODEL": base, "ADAPTER": adapter})
        push_folder(
            folder, repo_id, message="Compare refusals with agl_trl", files=_names(Path(folder)), repo_type="space"
        )
    return f"{constants.ENDPOINT}/spaces/{repo_id}"


def write_space(folder: Path, models: list[str]) -> None:
    """Write the files of a Space; `models` are named in its front matter, so that their pages link to it."""
    for name in ("app.py", "README.md", "requirements.txt"):
        text = files(TEMPLATE).joinpath(name).read_text(encoding="utf-8")
        if name == "README.md" and models:
            listed = "".join(f"  - {model}\n" for model in models)
            text = text.replace("\n---\n", f"\nmodels:\n{listed}---\n", 1)
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copytree(PACKAGE, folder / "agl_trl", ignore=shutil.ignore_patterns(*LEFT_OUT))


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _set_variables(repo_id: str, wanted: dict[str, str | None]) -> None:
    api = HfApi()
    try:
        found = {name: variable.value for name, variable in api.get_space_variables(repo_id).items()}
        for name, value in wanted.items():
            if value and found.get(name) != value:
                api.add_space_variable(repo_id, name, value)
            elif not value and name in found:  # of an earlier push, and no longer meant
                api.delete_space_variable(repo_id, name)
    except FAILURES as error:
        raise PushError.because(f"Can't set the variables of the Space '{repo_id}'", error) from error
