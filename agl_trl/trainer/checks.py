"""What can be told before a run begins: about arguments, the model, and how the run is distributed."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..artifacts.files import FISHER_FILE, FOLDER, REFERENCE_ANSWERS_FILE, write_atomically
from ..data.alignment import raw_text_warning, select_rows, tokenize_row
from ..data.rows import is_prompt_only
from ..fisher.protected_rows import ALIGNMENT
from .config import AlignGuardConfig


logger = get_logger(__name__)

Rows: TypeAlias = Dataset | IterableDataset | Sequence[dict[str, Any]]
BEHAVIOUR = re.compile(r"[\w-]{1,60}")
OFF = "or set `alignment_coef=0` to train without AGL"


def check_writable(args: TrainingArguments) -> None:
    """
    Check that results can be kept.

    Raises:
        `OSError`: If the output folder can't be written.
    """
    if args.should_save:
        probe = Path(args.output_dir) / FOLDER / "writable"
        write_atomically(probe, b"")
        probe.unlink()


def withheld(config: AlignGuardConfig) -> list[str]:
    """Names of the files of evidence that the options keep from the Hub; reference answers are not pushed without the statistics."""
    names = [] if config.push_fisher else [FISHER_FILE]
    return names if config.push_fisher and config.push_reference_answers else [*names, REFERENCE_ANSWERS_FILE]


def check_push(args: TrainingArguments, files: list[str]) -> None:
    """
    Check that a push by a trainer that knows nothing of evidence, and takes all that lies in its folder, leaves files out.

    Args:
        args (`TrainingArguments`):
            Arguments of the trainer.
        files (`list[str]`):
            Names of the files in `agl/`.

    Raises:
        `ValueError`: If one of them would be pushed.
    """
    strategy = HubStrategy(args.hub_strategy)
    if files and args.push_to_hub and strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"`hub_strategy='{strategy.value}'` pushes whole checkpoints, which '{FOLDER}/{files[0]}' is a part of, and the options keep "
            "this file from the Hub: set `hub_strategy` to 'every_save' or 'end'."
        )
    for name in files:
        if (path := Path(args.output_dir) / FOLDER / name).exists():
            raise ValueError(
                f"The trainer would push '{path}', which the options keep from the Hub: move it elsewhere, or push the folder with "
                "`agl-trl push`."
            )


def check_adapter(model: Any) -> None:
    """
    Check that a model carries an adapter.

    Raises:
        `ValueError`: If it does not.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(  # noqa: TRY004 (an option that is missing)
            "AGL guards a LoRA adapter, but there is none: pass `peft_config=LoraConfig(...)` to the trainer (or a model from "
            "`get_peft_model`), or set `alignment_coef=0` (and no budget, anchor or other coefficient)."
        )


def check_rows(
    config: AlignGuardConfig,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: Rows | None,
    protect: dict[str, Rows],
    args: TrainingArguments,
) -> None:
    """
    Check that a row of every dataset can be read, and answered where it has no answer. Text for a chat model is told.

    Raises:
        `ValueError`: With the reason.
    """
    predicts = model.get_output_embeddings() is not None
    if not predicts and protect:
        raise ValueError("`protect` compares next tokens, but this model predicts none: leave it out.")
    if not predicts and config.anchor_coef and config.kl_budget is None:
        raise ValueError("`anchor_coef` compares next tokens, but this model predicts none: set `anchor_coef=0`.")
    given: list[tuple[Rows, bool | None]] = [(dataset, None) for dataset in protect.values()]
    if rows is not None and (config.fisher_path is None or config.anchored):
        given = [(rows, True), *given]
    for dataset, unsafe in given:
        if tokenizer is None:
            raise ValueError("Alignment rows need a tokenizer: pass `processing_class=`, or set `fisher_path`.")
        (row,) = select_rows(dataset, 1, args.seed, unsafe=unsafe)
        if (warning := raw_text_warning(row, tokenizer)) is not None:
            logger.warning(warning)
        if not is_prompt_only(row):
            tokenize_row(row, tokenizer, config.fisher_max_length)
            continue
        reason = None
        if not predicts:
            reason = "this one predicts no tokens"
        elif AcceleratorState().distributed_type == DistributedType.FSDP:
            reason = "it can't generate under FSDP"
        if reason is not None:
            raise ValueError(
                f"Rows without answers are answered by the model, but {reason}: pass `alignment_dataset=` with answers, or set "
                "`fisher_path`."
            )


def check_protect(config: AlignGuardConfig, protect: dict[str, Rows]) -> dict[str, Rows]:
    """
    Check the names of protected behaviours. Returns them with their rows.

    Raises:
        `ValueError`: If a name is taken or no plain word, or nothing measures these rows.
    """
    for name in protect:
        if not BEHAVIOUR.fullmatch(name) or name == ALIGNMENT:
            raise ValueError(
                f"`protect` names '{name}': a name is a word of letters, digits, '-' and '_', other than '{ALIGNMENT}', which is "
                "that of `alignment_dataset`."
            )
    behaviours = [ALIGNMENT, *protect]
    if config.fisher_path is None and (
        unknown := {*(config.kl_budgets or ())} - {*behaviours}
    ):  # published: known later
        raise ValueError(f"`kl_budgets` names '{min(unknown)}', but what is protected is {', '.join(behaviours)}.")
    if protect and not config.anchored:
        raise ValueError("`protect` holds rows by their KL: set `kl_budget` (or `anchor_coef`).")
    return protect


def check_processor(processing_class: Any) -> None:
    """
    Check that a model is trained on text.

    Raises:
        `TypeError`: With a vision-language model.
    """
    if isinstance(processing_class, ProcessorMixin):
        raise TypeError(
            "AGL takes its statistics from text alone and does not guard vision-language models yet: pass the tokenizer to train "
            "the language model on text, or set `alignment_coef=0`."
        )


def check_engine(args: TrainingArguments, config: AlignGuardConfig, state: AcceleratorState) -> None:
    """
    Check how a run is distributed: whether every process can see the adapter, and the penalty keeps its weight.

    Args:
        args (`TrainingArguments`):
            Training arguments.
        config ([`AlignGuardConfig`]):
            What is switched on.
        state (`AcceleratorState`):
            Accelerate's state; its plugins say which engine runs.

    Raises:
        `ValueError`: Under an engine that AGL does not run on, with the reason.
    """
    deepspeed, parallel = state.deepspeed_plugin, state.parallelism_config
    fsdp = state.fsdp_plugin if state.distributed_type == DistributedType.FSDP else None
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError(f"Under DeepSpeed ZeRO-3 no process holds the adapter: use ZeRO-2, DDP or FSDP2, {OFF}.")
    if deepspeed is not None and config.drift_budget is not None:
        raise ValueError(
            "DeepSpeed keeps its own copy of the weights, which `drift_budget` can't scale back: use DDP or FSDP2, or "
            "`alignment_coef` in its place."
        )
    if fsdp is not None:
        if fsdp.fsdp_version == 1:
            raise ValueError(
                f"FSDP1 flattens the adapter into buffers that AGL can't read: set `fsdp_version: 2`, {OFF}."
            )
        if "FULL_STATE_DICT" not in str(fsdp.state_dict_type):
            raise ValueError(
                "Sharded checkpoints hold no adapter file that the drift report could describe: set `fsdp_state_dict_type: "
                f"FULL_STATE_DICT`, {OFF}."
            )
    if parallel is not None and max(parallel.tp_size, parallel.cp_size, parallel.sp_size) > 1:
        raise ValueError(
            f"AGL runs on data parallelism alone: leave tensor, context and sequence parallelism out, {OFF}."
        )
