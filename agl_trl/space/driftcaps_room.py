"""The room where a prompt set goes through every side."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from .driftcaps_run import (
    FILTERS,
    MOST_PROMPTS,
    SETS,
    Result,
    categories,
    chart_html,
    files_html,
    progress_html,
    run,
    table_html,
)
from .models import Models
from .side_by_side import notice_html
from .zero_gpu import on_gpu


NOTE = (
    "The embedded model speaks a template grammar and reads no ordinary English: on DriftCaps its answers, and so its verdicts, mean little. "
    "Its own held-out prompts are the set “Embedded world”; DriftCaps is for models you load."
)


def build(models: Models, base: gr.Textbox, adapter: gr.Textbox) -> None:
    """Lay the room out."""
    first = "Embedded world" if models.own.embedded else "DriftCaps"
    if models.own.embedded:
        gr.HTML(notice_html(NOTE, "info"))
    with gr.Row(elem_classes="agl-settings"):
        name = gr.Radio(list(SETS), value=first, label="Prompts", elem_id="set")
        number = gr.Slider(
            8, MOST_PROMPTS, value=64, step=8, label="Number", info="spread over categories", elem_id="number"
        )
        length = gr.Slider(8, 128, value=48, step=8, label="Longest answer", info="in tokens", elem_id="run-length")
    chosen = gr.Dropdown(
        list(categories(first)),
        value=[],
        multiselect=True,
        label="Categories",
        info="none chosen: all",
        elem_id="categories",
    )
    with gr.Row(elem_classes="agl-actions"):
        start = gr.Button("Run", variant="primary", elem_id="run", min_width=120)
        stop = gr.Button("Stop", elem_id="run-stop", min_width=80)
    progress = gr.HTML(elem_id="progress")
    chart = gr.HTML(elem_id="chart")
    result = gr.State(None)
    with gr.Column(visible=False) as details:
        with gr.Row(elem_classes="agl-settings"):
            shown = gr.Radio(list(FILTERS), value="All", label="Show", elem_id="filter")
            words = gr.Textbox(
                label="Filter", placeholder="words in a prompt, category or answer", max_length=200, elem_id="words"
            )
        rows = gr.HTML(elem_id="table")
        links = gr.HTML(elem_id="files")

    def go(*request: Any) -> Iterator[tuple[Any, ...]]:
        found: Result | None = None
        try:
            for found in run(models, *request):
                yield progress_html(found, False), chart_html(found), gr.skip(), gr.skip(), gr.skip(), gr.skip()
        except ValueError as error:
            yield notice_html(str(error)), gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip()
            return
        assert found is not None
        whole = gr.Radio(value="All"), gr.Column(visible=True)
        yield progress_html(found, True), chart_html(found), found, files_html(found), *whole

    hidden: Any = dict(api_visibility="private", show_progress="hidden")
    filtered: Any = dict(fn=table_html, inputs=[result, shown, words], outputs=rows, **hidden)
    going = start.click(
        on_gpu(go, seconds=120),
        [name, chosen, number, length, base, adapter],
        [progress, chart, result, links, shown, details],
        concurrency_id="run",
        trigger_mode="once",
        **hidden,
    )
    going.then(**filtered)
    stop.click(None, None, None, cancels=[going], **hidden)
    shown.input(**filtered)
    words.input(**filtered)
    name.change(lambda name: gr.Dropdown(choices=list(categories(name)), value=[]), name, chosen, **hidden)
