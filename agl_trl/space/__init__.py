"""
The app that compares refusals before and after fine-tuning, in a browser: `agl-trl space`, or a Space on the Hub.

Endpoints for programs, through `gradio_client`: `/models`, `/answers` (streams), `/driftcaps_run` (streams) and
`/drift_map`; all answer with JSON.
"""

from ..artifacts.extras import needs_extra


with needs_extra("space", "Comparisons in the browser"):
    from .app import build_app, launch_options


__all__ = ["build_app", "launch_options"]
