"""
The app that compares refusals before and after fine-tuning, in a browser: `agl-trl space`, or a Space on the Hub.

Endpoints for programs, through `gradio_client`: `/models`, `/answers` (streams), `/driftcaps_run` (streams) and
`/drift_map`; all answer with JSON. Gradio is imported with the app, and only then: the extra `space` brings it.
"""

from typing import TYPE_CHECKING, Any

from ..artifacts.extras import needs_extra


if TYPE_CHECKING:
    from .app import build_app, launch_options

__all__ = ["build_app", "launch_options"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'agl_trl.space' has no attribute {name!r}")
    with needs_extra("space", "Comparisons in the browser"):
        from . import app
    return getattr(app, name)
