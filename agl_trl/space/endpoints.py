"""The same for programs: endpoints with names, JSON in and out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from . import drift_map, driftcaps_run, side_by_side
from .models import Models
from .zero_gpu import on_gpu


def add_endpoints(models: Models) -> None:
    """Add `/models`, `/answers`, `/driftcaps_run` and `/drift_map` to the app that is being built."""

    def models_of(base: str = "", adapter: str = "") -> list[dict[str, Any]]:
        """
        The models that are compared.

        Args:
            base: Base model on the Hub; empty: the one that the adapter names.
            adapter: Adapter on the Hub; empty: the app's own.
        """
        with _in_a_sentence():
            return [{"model": side.title, "detail": side.detail} for side in models.get(base, adapter).sides]

    def answers(
        prompt: str, temperature: float = 0.0, seed: int = 0, length: int = 64, base: str = "", adapter: str = ""
    ) -> Iterator[list[dict[str, Any]]]:
        """
        Answers of all models to a prompt as they grow, with verdict, score, reason and seconds.

        Args:
            prompt: At most 2,000 characters.
            temperature: 0 (greedy) to 2.
            seed: Of the sampling.
            length: Longest answer in tokens, 1 to 512.
            base: Base model on the Hub; empty: the one that the adapter names.
            adapter: Adapter on the Hub; empty: the app's own.
        """
        with _in_a_sentence():
            for panes in side_by_side.answers(models, prompt, temperature, seed, length, base, adapter):
                yield [pane.as_json() for pane in panes]

    def driftcaps(
        prompt_set: str = "DriftCaps",
        categories: list[str] | None = None,
        number: int = 48,
        length: int = 48,
        base: str = "",
        adapter: str = "",
    ) -> Iterator[dict[str, Any]]:
        """
        Refusals of all models by category, with intervals and every row, growing batch by batch.

        Args:
            prompt_set: "DriftCaps" or "Embedded world".
            categories: Categories to ask; none: all.
            number: Prompts, 1 to 240, spread over the categories.
            length: Longest answer in tokens, 1 to 512.
            base: Base model on the Hub; empty: the one that the adapter names.
            adapter: Adapter on the Hub; empty: the app's own.
        """
        with _in_a_sentence():
            for result in driftcaps_run.run(models, prompt_set, categories or [], number, length, base, adapter):
                yield driftcaps_run.summary(result)

    def drift(base: str = "", adapter: str = "") -> list[dict[str, Any]]:
        """
        The drift report of every adapter by layer, or a notice where there is none.

        Args:
            base: Base model on the Hub; empty: the one that the adapter names.
            adapter: Adapter on the Hub; empty: the app's own.
        """
        with _in_a_sentence():
            return drift_map.summary(models.get(base, adapter))

    gr.api(models_of, api_name="models", concurrency_id="loading")
    gr.api(on_gpu(answers), api_name="answers", concurrency_id="answers")
    gr.api(on_gpu(driftcaps, seconds=120), api_name="driftcaps_run", concurrency_id="run")
    gr.api(drift, api_name="drift_map", concurrency_id="loading")


@contextmanager
def _in_a_sentence() -> Iterator[None]:
    """What is wrong with a request goes to who sent it, and not into the log."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
