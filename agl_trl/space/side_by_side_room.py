"""The room where one question goes to every side."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from .models import Models
from .questions import HOTTEST, LARGEST_SEED, LONGEST_ANSWER
from .side_by_side import EXAMPLES, answers, idle, notice_html, panes_html
from .zero_gpu import on_gpu


def build(models: Models, base: gr.Textbox, adapter: gr.Textbox) -> tuple[gr.HTML, list[Any]]:
    """Lay the room out; its panes, and the inputs that a link restores: prompt, temperature, seed, length."""

    def ask(*request: Any) -> Iterator[str]:
        try:
            for shown in answers(models, *request):
                yield panes_html(shown)
        except ValueError as error:
            yield notice_html(str(error))

    ask = on_gpu(ask)
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
        length = gr.Slider(
            8, LONGEST_ANSWER, value=64, step=8, label="Longest answer", info="in tokens", elem_id="length"
        )
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
    settings = [prompt, temperature, seed, length]
    with gr.Row(elem_classes="agl-examples"):
        examples = [gr.Button(f"{kind}: {text}", size="sm", min_width=0) for kind, text in EXAMPLES]
    panes = gr.HTML(panes_html(idle(models.own)), elem_id="panes")

    hidden: Any = dict(api_visibility="private", show_progress="hidden")
    asking: Any = dict(
        fn=ask,
        inputs=[*settings, base, adapter],
        outputs=panes,
        concurrency_id="answers",
        trigger_mode="once",
        **hidden,
    )
    running: list[dict[str, Any]] = [send.click(**asking), prompt.submit(**asking)]
    for button, (_, text) in zip(examples, EXAMPLES, strict=True):
        running.append(button.click(lambda text=text: text, None, prompt, queue=False, **hidden).then(**asking))
    stop.click(None, None, None, js="() => aglStopped()", cancels=running, **hidden)

    def wipe(base: str, adapter: str) -> tuple[str, str]:
        try:
            return "", panes_html(idle(models.get(base, adapter)))
        except ValueError:  # what is in the boxes is not loaded yet
            return "", panes_html(idle(models.own))

    clear.click(wipe, [base, adapter], [prompt, panes], cancels=running, **hidden)
    link.click(None, [*settings, base, adapter], None, js="(...values) => aglLink(...values)", **hidden)
    return panes, settings
