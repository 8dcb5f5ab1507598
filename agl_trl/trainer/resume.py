"""Where the layers of a run started, and what one that goes on from a checkpoint takes from it: statistics, factors, multiplier."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..artifacts.files import ADAPTER_FILE, DRIFT_FILE, FISHER_FILE, FOLDER, REFERENCE_ANSWERS_FILE, ArtifactError
from ..artifacts.location import find_artifact
from ..drift.report import DriftReport
from ..fisher.reference_answers import ReferenceAnswers
from ..fisher.statistics import FisherStatistics
from ..modeling.lora import AdaptedLayer, active_adapter, adapted_layers
from ..modeling.reference_factors import REFERENCE_FILE, load_reference
from ..modeling.sharding import whole


def is_of(model: Any, layers: list[AdaptedLayer]) -> bool:
    """Whether layers are those of a model: there may be none yet, and a trainer with `model_init` makes another one at every training."""
    return bool(layers) and any(module is layers[0].module for module in model.modules())


def started(layers: list[AdaptedLayer]) -> list[AdaptedLayer]:
    """Layers as a training starts; of an adapter that has moved already, which is continued, with where they are for reference."""
    if any(layer.has_moved() for layer in layers):
        return [layer.with_reference() for layer in layers]
    return layers


def started_late(layers: list[AdaptedLayer], earlier: list[AdaptedLayer], state: TrainerState) -> list[AdaptedLayer]:
    """
    [`started`] of a model that was not there, or not looked at, when its trainer was built. Where a run goes on, it holds the
    weights of a checkpoint by now, and started where the model before it did.

    Args:
        layers (`list[AdaptedLayer]`):
            Layers of the model.
        earlier (`list[AdaptedLayer]`):
            Those of the model before it, if there was one.
        state (`TrainerState`):
            State of the trainer.
    """
    if state.global_step == 0:
        return started(layers)
    starts = {layer.name: layer.reference for layer in earlier}
    beside = {tensor.name: tensor.reference for layer in earlier[:1] for tensor in layer.beside}
    for tensor in [tensor for layer in layers[:1] for tensor in layer.beside]:
        tensor.reference = beside.get(tensor.name)
    return [replace(layer, reference=starts.get(layer.name)) for layer in layers]


def checkpoint_statistics(checkpoint: str | Path, given: FisherStatistics | None) -> FisherStatistics:
    """
    Statistics the run began with; never taken again, because the weights of a checkpoint have drifted.

    Args:
        checkpoint (`str` or `Path`):
            Folder of the checkpoint.
        given ([`FisherStatistics`], *optional*):
            Statistics from `fisher_path`, for a checkpoint without a file of its own.

    Raises:
        [`ArtifactError`]: If there are neither.
    """
    try:
        location = find_artifact(checkpoint, FISHER_FILE)
    except ArtifactError as error:
        if given is not None:
            return given
        raise ArtifactError(
            f"Checkpoint '{checkpoint}' has no '{FOLDER}/{FISHER_FILE}', and the statistics can't be taken again: its weights "
            "have already drifted. Copy the file from the output folder into the checkpoint, or set `fisher_path`."
        ) from error
    return FisherStatistics.from_pretrained(location)


def resumed_from(args: TrainingArguments, state: TrainerState, model: PeftModel) -> Path | None:
    """
    Folder of the checkpoint that a plain `Trainer` goes on from, which tells its callbacks the step alone; `None` of a run
    that begins.

    Raises:
        [`ArtifactError`]: If there is no such folder, or it holds another adapter than the one that was loaded.
    """
    if state.global_step == 0:
        return None
    given = args.resume_from_checkpoint  # for scripts; the trainer itself does not set it
    named = Path(given) if isinstance(given, str) and given.endswith(f"-{state.global_step}") else None
    folder = named or Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    if not folder.is_dir():
        wrong = f"there is no checkpoint '{folder}' to read its statistics from"
    elif not _holds(folder, model):
        wrong = f"checkpoint '{folder}' holds another adapter, of another run"
    else:
        return folder
    raise ArtifactError(
        f"This run goes on at step {state.global_step}, but {wrong}: set `resume_from_checkpoint` in the training arguments to the "
        "folder that it goes on from."
    )


def _holds(checkpoint: Path, model: PeftModel) -> bool:
    """Whether a checkpoint holds the LoRA factors of a model; under FSDP2 all processes must ask. One without a file may."""
    name = active_adapter(model)
    loaded = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    factors = {key: whole(tensor.detach()).cpu().float() for key, tensor in loaded.items() if "lora_" in key}
    file = _adapter_file(checkpoint, name)
    if not file.is_file():
        return True
    with safe_open(file, "pt") as kept:
        if not {*factors} <= {*kept.keys()}:
            return False
        pairs = [(factor, kept.get_tensor(key).float()) for key, factor in factors.items()]
    # As far as bfloat16 tells: it may have been loaded in another type.
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-2, atol=1e-6) for a, b in pairs)


def _adapter_file(checkpoint: str | Path, name: str) -> Path:
    """Where PEFT saves an adapter: any other than the default one in a folder of its name."""
    return Path(checkpoint) / ("" if name == "default" else name) / ADAPTER_FILE


def step_of_weights(args: TrainingArguments, state: TrainerState) -> int:
    """Step of the weights that a training ends with: of the best ones, where those were put back."""
    best = args.load_best_model_at_end and state.best_model_checkpoint is not None
    return state.best_global_step if best else state.global_step


@dataclass
class CheckpointState:
    """
    What steers a run, as it was when a checkpoint was saved.

    Args:
        multiplier (`float`, *optional*, defaults to `0.0`):
            Of the drift budget.
        share_per_drift (`float`, *optional*):
            Share of the KL budget that a relative drift of 1 stands for, of the trust region.
        references ([`ReferenceAnswers`], *optional*):
            Answers of the reference model.
    """

    multiplier: float = 0.0
    share_per_drift: float | None = None
    references: ReferenceAnswers | None = None


def checkpoint_state(checkpoint: str | Path, model: PeftModel) -> tuple[list[AdaptedLayer], CheckpointState]:
    """
    Layers with the references they started from, and what steers the run; of a checkpoint of plain TRL, nothing.

    Raises:
        [`ArtifactError`]: If the checkpoint is of a continued adapter and its start is missing, or its report is broken or of
            another adapter.
    """
    layers = load_reference(checkpoint, adapted_layers(model))
    try:
        location = find_artifact(checkpoint, DRIFT_FILE)
    except ArtifactError:
        return layers, CheckpointState()
    report = DriftReport.from_pretrained(location)  # a broken one is told: the budget would start anew without a word
    adapter = _adapter_file(checkpoint, layers[0].adapter)
    if report.adapter_sha256 is not None and adapter.is_file():
        report.check_describes(adapter)
    if report.metadata.get("continued") and layers[0].reference is None:
        raise ArtifactError(
            f"Checkpoint '{checkpoint}' is of a continued adapter, but '{FOLDER}/{REFERENCE_FILE}', where it started, is missing: "
            "copy it from another checkpoint of the run."
        )
    file = Path(checkpoint) / FOLDER / REFERENCE_ANSWERS_FILE
    references = ReferenceAnswers.from_pretrained(file) if file.is_file() else None
    share = report.metadata.get("protected", {}).get("share_per_drift")
    return layers, CheckpointState(report.budget_multiplier or 0.0, share, references)
