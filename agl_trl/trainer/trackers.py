"""Trackers of a trainer: `agl/*` metrics reach all of them, and the drift report those that take pictures and tables."""

import inspect
from collections.abc import Iterable
from io import BytesIO
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)
from transformers.trainer_callback import CallbackHandler

from ..drift.plots import picture
from ..drift.report import DriftReport
from ..drift.schema import PER_LAYER


TRACKERS = tuple(INTEGRATION_TO_CALLBACK.values())


def calling_handler() -> CallbackHandler | None:
    """
    The list of callbacks that is calling one of them right now. No event hands it over, so that the stack is asked. None where
    a callback is called by something else.
    """
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            return handler
        frame = frame.f_back
    return None


def call_before_trackers(handler: CallbackHandler, callback: TrainerCallback) -> None:
    """
    Let a callback be called before all trackers, so that they get what it adds to a log. A trainer puts those of `report_to`
    before any callback of its user.

    Args:
        handler (`CallbackHandler`):
            Callbacks of a trainer.
        callback (`TrainerCallback`):
            One of them.
    """
    others = [other for other in handler.callbacks if other is not callback]
    trackers = [place for place, other in enumerate(others) if isinstance(other, TRACKERS)]
    if trackers and trackers[0] < handler.callbacks.index(callback):
        # A new list: the old one may be being walked through.
        handler.callbacks = [*others[: trackers[0]], callback, *others[trackers[0] :]]


def log_report(callbacks: Iterable[TrainerCallback], report: DriftReport, step: int) -> None:
    """
    Log the picture of a report and its drift by layer where TensorBoard, Trackio or Weights & Biases are among the callbacks.

    Args:
        callbacks (`Iterable[TrainerCallback]`):
            Callbacks of a trainer, on the process that logs.
        report ([`DriftReport`]):
            Report of the adapter at the end.
        step (`int`):
            Step at which it is shown.
    """
    trackers = [c for c in callbacks if isinstance(c, TensorBoardCallback | TrackioCallback | WandbCallback)]
    if not trackers or not report.layers:
        return
    columns = ["layer", *PER_LAYER]
    rows = [[n, *v] for n, *v in zip(report.layers, *(getattr(report, p).tolist() for p in PER_LAYER), strict=True)]
    content = picture(report)
    for tracker in trackers:
        if isinstance(tracker, TensorBoardCallback):
            _to_tensorboard(tracker.tb_writer, columns, rows, content, step)
        elif isinstance(tracker, TrackioCallback):
            import trackio

            _to_run(trackio, columns, rows, content, step)
        else:
            import wandb

            _to_run(wandb, columns, rows, content, step)


def _pixels(content: bytes) -> Any:
    """A PNG as bytes of shape `(height, width, 3)`."""
    from matplotlib.image import imread  # which drew it

    return np.rint(imread(BytesIO(content))[..., :3] * 255).astype(np.uint8)


def _to_tensorboard(writer: Any, columns: list[str], rows: list[list], content: bytes | None, step: int) -> None:
    lines = [columns, ["---"] * len(columns), *([name, *(f"{value:.3e}" for value in v)] for name, *v in rows)]
    writer.add_text("agl/drift_by_layer", "\n".join(f"| {' | '.join(line)} |" for line in lines), step)
    if content is not None:
        writer.add_image("agl/drift", _pixels(content), step, dataformats="HWC")
    writer.flush()


def _to_run(library: Any, columns: list[str], rows: list[list], content: bytes | None, step: int) -> None:
    """Trackio has the interface of Weights & Biases."""
    entries = {"agl/drift_by_layer": library.Table(columns=columns, data=rows)}
    if content is not None:
        entries["agl/drift"] = library.Image(_pixels(content))
    library.log({**entries, "train/global_step": step})
