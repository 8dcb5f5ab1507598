"""The evidence of a run: statistics, drift report and picture, next to the adapter they are about."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save
from transformers import TrainerState

from ..artifacts.files import ADAPTER_FILE, FISHER_FILE, FOLDER, PICTURE_FILE, REFERENCE_ANSWERS_FILE, sha256
from ..drift.plots import plot_drift
from ..drift.report import DriftReport
from ..fisher.reference_answers import ReferenceAnswers
from ..fisher.statistics import FisherStatistics
from ..modeling.lora import AdaptedLayer, whole
from ..modeling.reference_factors import save_reference
from .config import AlignGuardConfig
from .protection import Protection
from .regularizer import Regularizer, settings_of


LOGGED = {"step": "step", "relative_drift": "agl/relative_drift", "penalty": "agl/penalty", "loss": "loss"}


def drift_of(
    model: PeftModel,
    config: AlignGuardConfig,
    statistics: FisherStatistics,
    layers: list[AdaptedLayer],
    regularizer: Regularizer | None,
    protection: Protection | None,
    state: TrainerState,
    *,
    step: int,
) -> DriftReport:
    """
    Report of the adapter as it is now, with the history of its run.

    Args:
        model (`PeftModel`):
            Model in training.
        config ([`AlignGuardConfig`]):
            What is switched on.
        statistics ([`FisherStatistics`]):
            Statistics of the alignment rows.
        layers (`list[AdaptedLayer]`):
            Layers with their references.
        regularizer ([`Regularizer`], *optional*):
            Of a run that has begun.
        protection ([`Protection`], *optional*):
            Its protected behaviours, where it has any.
        state (`TrainerState`):
            State of the trainer, for the history.
        step (`int`):
            Training step of the weights.
    """
    report = DriftReport.measure(model, statistics, config.fisher_energy, layers)
    logged = [entry for entry in state.log_history if "agl/relative_drift" in entry and "loss" in entry]
    report.history = {name: torch.tensor([float(entry[key]) for entry in logged]) for name, key in LOGGED.items()}
    report.global_step = step
    report.metadata["coefficients"] = settings_of(config)
    report.metadata["continued"] = layers[0].reference is not None
    if regularizer is not None and regularizer.budget is not None:
        report.budget_multiplier = regularizer.budget.multiplier.item()
        report.metadata["coefficients"]["drift_budget"] = regularizer.budget.budget  # also a translated one
    if protection is not None:
        report.metadata["protected"] = protection.described()
        if regularizer is not None and regularizer.trust_region is not None:
            report.metadata["protected"]["share_per_drift"] = regularizer.trust_region.share_per_drift.item()
    return report


def save_evidence(
    folder: Path,
    statistics: FisherStatistics,
    references: ReferenceAnswers | None,
    report: DriftReport,
    layers: list[AdaptedLayer],
    withheld: Sequence[str] = (),
) -> None:
    """
    Write statistics, reference answers, report and picture into the folder of an adapter.

    Args:
        folder (`Path`):
            Folder with `adapter_model.safetensors`, or one that it will be saved to.
        statistics ([`FisherStatistics`]):
            Statistics of the alignment rows.
        references ([`ReferenceAnswers`], *optional*):
            Answers of the reference model, where there are any.
        report ([`DriftReport`]):
            Report of the adapter; a hash that it lacks is taken from the file in the folder.
        layers (`list[AdaptedLayer]`):
            Layers with their references.
        withheld (`Sequence[str]`, *optional*, defaults to `()`):
            Names of files that are not written: statistics or reference answers that a push of the folder must not take.
    """
    name = layers[0].adapter  # PEFT saves any other than the default one in a folder of its name
    adapter = folder / ("" if name == "default" else name) / ADAPTER_FILE
    if report.adapter_sha256 is None and adapter.is_file():
        report.adapter_sha256 = sha256(adapter)
    if FISHER_FILE not in withheld:
        statistics.save_pretrained(folder)
    if references is not None and REFERENCE_ANSWERS_FILE not in withheld:
        references.save_pretrained(folder)
    save_reference(folder, layers)
    report.save_pretrained(folder)
    plot_drift(report, folder / FOLDER / PICTURE_FILE)


def sha256_when_saved(model: PeftModel, adapter: str) -> str:
    """SHA-256 that the file of an adapter will have once PEFT has saved it; under FSDP2 all processes must ask."""
    tensors = get_peft_model_state_dict(model, adapter_name=adapter)
    # Copies: tied embeddings share their memory, which PEFT undoes and safetensors refuses.
    whole_tensors = {name: whole(tensor.detach()).cpu().contiguous().clone() for name, tensor in tensors.items()}
    return hashlib.sha256(save(whole_tensors, metadata={"format": "pt"})).hexdigest()
