"""The tabs of the page: what a visitor sees and presses, over the logic beside it."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from .drift_map import MEASURES, drift_map
from .driftcaps_run import (
    FILTERS,
    MOST_PROMPTS,
    Result,
    categories,
    downloads,
    run,
    select_rows,
)
from .models import Model, Models
from .questions import HOTTEST, LARGEST_SEED, LONGEST_ANSWER, SETS
from .side_by_side import EXAMPLES, Pane, answers, idle
from .views import render
from .zero_gpu import on_gpu


HIDDEN: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")  # of every event but the endpoints
NOTE = (
    "The embedded model speaks a template grammar and reads no ordinary English: on DriftCaps its answers, and so its verdicts, mean little. "
    "Its own held-out prompts are the set “Embedded world”; DriftCaps is for models you load."
)


def notice(text: str, kind: str = "error") -> str:
    """A sentence in a box; `kind` is `"error"` or `"info"`."""
    return render("notice", text=text, kind=kind)


def panes_html(panes: list[Pane]) -> str:
    """Answers beside each other."""
    return render("panes", panes=panes)


def map_html(model: Model, measure: str) -> str:
    """The drift map of a model."""
    return render("drift_map", map=drift_map(model, measure))


def side_by_side_tab(models: Models, base: gr.Textbox, adapter: gr.Textbox) -> tuple[gr.HTML, list[Any]]:
    """One question to every side; its panes, and the inputs that a link restores: prompt, temperature, seed, length."""
    prompt = gr.Textbox(
        label="Your question",
        placeholder="Ask all models the same…",
        lines=1,
        max_lines=6,
        elem_id="prompt",
        autofocus=True,
    )
    with gr.Row(elem_classes="agl-settings"):
        temperature = gr.Slider(
            0, HOTTEST, value=0, step=0.1, label="Temperature", info="0 is greedy", elem_id="temperature"
        )
        length = _length_slider(LONGEST_ANSWER, 64, "length")
        seed = gr.Number(
            value=0,
            precision=0,
            minimum=0,
            maximum=LARGEST_SEED,
            label="Seed",
            info="for temperatures above 0",
            elem_id="seed",
        )
    with gr.Row(elem_classes="agl-actions"):
        send = gr.Button("Ask", variant="primary", elem_id="ask", min_width=120)
        stop = gr.Button("Stop", elem_id="stop", min_width=80)
        clear = gr.Button("Clear", elem_id="clear", min_width=80)
        link = gr.Button("Copy link", elem_id="link", min_width=100)
    with gr.Row(elem_classes="agl-examples"):
        examples = [gr.Button(f"{kind}: {text}", size="sm", min_width=0) for kind, text in EXAMPLES]
    panes = gr.HTML(panes_html(idle(models.own)), elem_id="panes")
    settings = [prompt, temperature, seed, length]

    def ask(*request: Any) -> Iterator[str]:
        try:
            for shown in answers(models, *request):
                yield panes_html(shown)
        except ValueError as error:
            yield notice(str(error))

    def wipe(base: str, adapter: str) -> tuple[str, str]:
        try:
            return "", panes_html(idle(models.get(base, adapter)))
        except ValueError:  # what is in the boxes is not loaded yet
            return "", panes_html(idle(models.own))

    asking: Any = dict(
        fn=on_gpu(ask),
        inputs=[*settings, base, adapter],
        outputs=panes,
        concurrency_id="answers",
        trigger_mode="once",
        **HIDDEN,
    )
    running: list[dict[str, Any]] = [send.click(**asking), prompt.submit(**asking)]
    for button, (_, text) in zip(examples, EXAMPLES, strict=True):
        running.append(button.click(lambda text=text: text, None, prompt, queue=False, **HIDDEN).then(**asking))
    stop.click(None, None, None, js="() => aglStopped()", cancels=running, **HIDDEN)
    clear.click(wipe, [base, adapter], [prompt, panes], cancels=running, **HIDDEN)
    link.click(None, [*settings, base, adapter], None, js="(...values) => aglLink(...values)", **HIDDEN)
    return panes, settings


def driftcaps_tab(models: Models, base: gr.Textbox, adapter: gr.Textbox) -> None:
    """A prompt set through every side."""
    first = "Embedded world" if models.own.embedded else "DriftCaps"
    if models.own.embedded:
        gr.HTML(notice(NOTE, "info"))
    with gr.Row(elem_classes="agl-settings"):
        name = gr.Radio(list(SETS), value=first, label="Prompts", elem_id="set")
        number = gr.Slider(
            8, MOST_PROMPTS, value=64, step=8, label="Number", info="spread over categories", elem_id="number"
        )
        length = _length_slider(128, 48, "run-length")
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
        same = gr.skip()
        try:
            for found in run(models, *request):
                yield _progress_html(found, ended=False), _chart_html(found), same, same, same, same
        except ValueError as error:
            yield notice(str(error)), same, same, same, same, same
            return
        assert found is not None
        links_html = render("downloads", files=downloads(found))
        whole = gr.update(value="All"), gr.update(visible=True)
        yield _progress_html(found, ended=True), same, found, links_html, *whole

    def table(result: Result | None, shown: str, words: str | None) -> str:
        if result is None:
            return ""
        chosen = select_rows(result, shown, words or "")
        return render("table", rows=chosen, total=len(result.rows), sides=result.sides)

    filtered: Any = dict(fn=table, inputs=[result, shown, words], outputs=rows, **HIDDEN)
    going = start.click(
        on_gpu(go, seconds=120),
        [name, chosen, number, length, base, adapter],
        [progress, chart, result, links, shown, details],
        concurrency_id="run",
        trigger_mode="once",
        **HIDDEN,
    )
    going.then(**filtered)
    stop.click(None, None, None, cancels=[going], **HIDDEN)
    shown.input(**filtered)
    words.input(**filtered)
    name.change(lambda name: gr.Dropdown(choices=list(categories(name)), value=[]), name, chosen, **HIDDEN)


def drift_map_tab(models: Models, base: gr.Textbox, adapter: gr.Textbox) -> tuple[gr.Radio, gr.HTML]:
    """How far each adapter moved the model; the choice of a measure, and the map."""
    first = next(iter(MEASURES))
    measure = gr.Radio(list(MEASURES), value=first, label="Colour shows", elem_id="measure")
    drawn = gr.HTML(map_html(models.own, first), elem_id="drift-map")

    def redraw(base: str, adapter: str, measure: str) -> str:
        try:
            return map_html(models.get(base, adapter), measure)
        except ValueError as error:
            return notice(str(error))

    measure.change(redraw, [base, adapter, measure], drawn, **HIDDEN)
    return measure, drawn


def _length_slider(most: int, value: int, elem_id: str) -> gr.Slider:
    return gr.Slider(8, most, value=value, step=8, label="Longest answer", info="in tokens", elem_id=elem_id)


def _progress_html(result: Result, ended: bool) -> str:
    return render("progress", done=len(result.rows), total=result.total, sides=result.sides, ended=ended)


def _chart_html(result: Result) -> str:
    return render("chart", groups=result.groups(), sides=result.sides) if result.rows else ""
