"""
The app that compares refusals before and after fine-tuning, in a browser: `agl-trl space`, or a Space on the Hub.

Endpoints for programs, through `gradio_client`: `/models`, `/answers` (streams), `/driftcaps_run` (streams) and
`/drift_map`; all answer with JSON. Gradio is imported with the app, and only then: the extra `space` brings it.
"""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .app import build_app, launch_options

__all__ = ["build_app", "launch_options"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'agl_trl.space' has no attribute {name!r}")
    try:
        from . import app
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("The app needs gradio: pip install 'agl-trl[space]'.") from error
    return getattr(app, name)
