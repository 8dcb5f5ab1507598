"""The page: three tabs over the same models."""

import os
from importlib.resources import files
from typing import Any

import gradio as gr
from gradio.themes.utils.fonts import LocalFont

from .endpoints import add_endpoints
from .models import Model, Models
from .side_by_side import idle
from .tabs import HIDDEN, drift_map_tab, driftcaps_tab, map_html, notice, panes_html, side_by_side_tab
from .views import render


ABOUT = """
The default is the embedded model of [agl_trl](https://huggingface.co/papers/2508.02079): one million parameters, a template grammar for a language, and two adapters that
learned the same harmless task, one plainly and one with AlignGuard-LoRA (AGL). It shows what a method does on a model that can lose its refusals, not how much it helps on a large one.

Verdicts read the words of an answer and can be wrong: "does not refuse" is no proof of harm, and of help neither. Nothing you type is stored; a link carries your prompt in its
last part (after `#`), which browsers keep to themselves.
"""


def build_app(base: str | None = None, adapter: str | None = None) -> gr.Blocks:
    """
    The app, its models loaded and asked once.

    Args:
        base (`str`, *optional*):
            Base model: folder, Hub id or `"miniworld"`; by default the variable `BASE_MODEL`, else what the adapter names.
        adapter (`str`, *optional*):
            Adapter: folder or Hub id; by default the variable `ADAPTER`, else the demo's two on the embedded model.

    Raises:
        `ValueError`: If they don't load.
    """
    base, adapter = base or os.environ.get("BASE_MODEL"), adapter or os.environ.get("ADAPTER")
    models = Models(base, adapter, hosted="SPACE_ID" in os.environ)
    models.own.warm_up()
    with gr.Blocks(title="Does it still refuse?", analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.HTML(render("header"))
        names, base_box, adapter_box, load = _model_bar(models)
        with gr.Tabs():
            with gr.Tab("Side by side", id="side-by-side"):
                panes, settings = side_by_side_tab(models, base_box, adapter_box)
            with gr.Tab("DriftCaps run", id="driftcaps"):
                driftcaps_tab(models, base_box, adapter_box)
            with gr.Tab("Drift map", id="drift-map"):
                measure, drift = drift_map_tab(models, base_box, adapter_box)
        with gr.Accordion("What this is, and what it is not", open=False):
            gr.Markdown(ABOUT)

        def show(base: str, adapter: str, measure: str) -> tuple[str, str, str]:
            try:
                model = models.get(base, adapter)
            except ValueError as error:
                told = notice(f"{error} Nothing was changed.")
                return told, panes_html(idle(models.own)), map_html(models.own, measure)
            return _names_html(model), panes_html(idle(model)), map_html(model, measure)

        minimal: Any = HIDDEN | dict(show_progress="minimal")
        loading: Any = dict(fn=show, inputs=[base_box, adapter_box, measure], outputs=[names, panes, drift])
        load.click(**loading, **minimal, concurrency_id="loading")
        adapter_box.submit(**loading, **minimal, concurrency_id="loading")
        # What a link carries is read in the browser; models are loaded only where it names some.
        carried = [*settings, base_box, adapter_box]
        restored = app.load(None, carried, carried, js="(...values) => aglRestore(...values)", **HIDDEN)
        restored.then(
            lambda base, adapter, measure: show(base, adapter, measure) if base or adapter else (gr.skip(),) * 3,
            [base_box, adapter_box, measure],
            [names, panes, drift],
            concurrency_id="loading",
            **HIDDEN,
        )
        add_endpoints(models)
    return app.queue(default_concurrency_limit=1, max_size=64)


def launch_options() -> dict[str, Any]:
    """Arguments of `launch()`: in Gradio 6 looks belong there."""
    folder = files(__package__)
    # Of the fonts that come with Gradio this one has all letters in bold, too.
    font = (LocalFont("IBM Plex Sans", weights=(400, 700)), "ui-sans-serif", "system-ui", "sans-serif")
    theme = gr.themes.Default(primary_hue="emerald", neutral_hue="slate", radius_size="md", font=font).set(
        body_text_color_subdued="*neutral_500",  # readable on white
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_large_text_size="*text_md",
        button_large_padding="10px 18px",
    )
    return {
        "theme": theme,
        "css": folder.joinpath("style.css").read_text(encoding="utf-8"),
        "head": f"<script>{folder.joinpath('script.js').read_text(encoding='utf-8')}</script>",
        "footer_links": ["api", "settings"],
        "ssr_mode": False,
        "enable_monitoring": False,
        "run_history": False,  # Gradio would keep what was typed in the browser
    }


def _names_html(model: Model) -> str:
    return render("names", sides=model.sides)


def _model_bar(models: Models) -> tuple[gr.HTML, gr.Textbox, gr.Textbox, gr.Button]:
    names = gr.HTML(_names_html(models.own), elem_id="models")
    with gr.Accordion("Compare other models", open=False), gr.Row(equal_height=True, elem_classes="agl-models"):
        base = gr.Textbox(
            label="Base model", placeholder="from the adapter's configuration", max_length=200, elem_id="base"
        )
        adapter = gr.Textbox(
            label="Adapter",
            placeholder="user/adapter on the Hub; empty: this app's own",
            max_length=200,
            elem_id="adapter",
        )
        load = gr.Button("Load", elem_id="load", scale=0, min_width=120)
    return names, base, adapter, load
