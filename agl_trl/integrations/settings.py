"""The section `agl` of a front end's config file, as a callback."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..data.files import load_rows
from ..trainer.callback import AlignGuardCallback
from ..trainer.config import AlignGuardConfig
from ..trainer.drift_eval_callback import DriftEvalCallback


ROWS = (
    "alignment_dataset",
    "alignment_dataset_config",
    "alignment_dataset_split",
    "protect",
)  # beside the config's own


def check_settings(settings: Mapping[str, Any]) -> None:
    """
    Check a section without loading anything.

    Args:
        settings (`Mapping`):
            Fields of [`AlignGuardConfig`], and where rows come from: `alignment_dataset` (a file, a dataset on the Hub, or
            `miniworld`) with `alignment_dataset_config` and `alignment_dataset_split`, and `protect`, names to files or datasets.

    Raises:
        `ValueError`: If a key is unknown, or a value can't be.
    """
    known = [*(field.name for field in fields(AlignGuardConfig)), *ROWS]
    if unknown := sorted({*settings} - {*known}):
        raise ValueError(
            f"`agl` has no key {', '.join(map(repr, unknown))}: use those of AlignGuardConfig, {', '.join(ROWS)}."
        )
    protect = settings.get("protect") or {}
    if not isinstance(protect, Mapping) or not all(isinstance(place, str) for place in protect.values()):
        raise ValueError(f"`agl.protect` must map names to files or datasets on the Hub, got {protect!r}.")
    config = _config(settings)
    if not config.agl_enabled and config.drift_eval_steps is None:
        raise ValueError("`agl` switches AGL off: leave the plugin out.")


def make_callback(settings: Mapping[str, Any]) -> AlignGuardCallback | DriftEvalCallback:
    """
    The callback that a section describes, with its rows loaded; where it switches AGL off and asks prompts, the one that asks.

    Args:
        settings (`Mapping`):
            As in [`check_settings`].

    Raises:
        `ValueError`: If the section is wrong, or its rows can't be read.
    """
    check_settings(settings)
    if not _config(settings).agl_enabled:
        return DriftEvalCallback(_config(settings))
    name = settings.get("alignment_dataset")
    split, config = settings.get("alignment_dataset_split") or "train", settings.get("alignment_dataset_config")
    protect = settings.get("protect") or {}
    return AlignGuardCallback(
        _config(settings),
        alignment_dataset=None if name is None else load_rows(name, split, config),
        protect={name: load_rows(place) for name, place in protect.items()},
    )


def _config(settings: Mapping[str, Any]) -> AlignGuardConfig:
    return AlignGuardConfig(**{name: value for name, value in settings.items() if name not in ROWS})
