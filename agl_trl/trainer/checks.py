"""What can be told before a model is loaded and a dataset prepared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..artifacts.files import FOLDER, write_atomically
from .config import AGLConfigMixin


def check_arguments(
    model: str | PreTrainedModel | PeftModel,
    args: AGLConfigMixin,
    peft_config: PeftConfig | None,
    alignment_dataset: Dataset | IterableDataset | Sequence[dict[str, Any]] | None,
) -> None:
    """
    Check the arguments of a trainer: above all, whether its results can be kept.

    Raises:
        `ValueError`: Without an adapter, with an anchor and no rows to anchor on.
        `OSError`: If the output folder can't be written.
    """
    if args.should_save:
        probe = Path(args.output_dir) / FOLDER / "writable"
        write_atomically(probe, b"")
        probe.unlink()
    if peft_config is None and not isinstance(model, PeftModel):
        raise ValueError(
            "AGL guards a LoRA adapter, but there is none: pass `peft_config=LoraConfig(...)`, or set `alignment_coef=0` (and no "
            "budget, anchor or other coefficient)."
        )
    if alignment_dataset is None and args.anchor_coef > 0:
        raise ValueError(
            "`anchor_coef` needs rows to anchor on: pass `alignment_dataset=`; saved statistics hold none."
        )


def check_run(
    args: AGLConfigMixin,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    accelerator: Accelerator,
    fsdp: bool,
) -> None:
    """
    Check what only a built trainer tells: the kind of model, and how the run is distributed (whether every process can see
    the adapter, and the penalty keeps its weight).

    Raises:
        `TypeError`: With a vision-language model.
        `ValueError`: Under an engine that AGL does not run on, with the reason.
    """
    if isinstance(processing_class, ProcessorMixin):
        raise TypeError(
            "AGL takes its statistics from text alone and does not guard vision-language models yet: pass the tokenizer to train "
            "the language model on text, or set `alignment_coef=0`."
        )
    off = "or set `alignment_coef=0` to train without AGL"
    deepspeed = accelerator.state.deepspeed_plugin
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError(f"Under DeepSpeed ZeRO-3 no process holds the adapter: use ZeRO-2, DDP or FSDP2, {off}.")
    if deepspeed is not None and args.drift_budget is not None:
        raise ValueError(
            "DeepSpeed keeps its own copy of the weights, which `drift_budget` can't scale back: use DDP or FSDP2, or "
            "`alignment_coef` in its place."
        )
    if fsdp:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version == 1:
            raise ValueError(
                f"FSDP1 flattens the adapter into buffers that AGL can't read: set `fsdp_version: 2`, {off}."
            )
        if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            raise ValueError(
                "Sharded checkpoints hold no adapter file that the drift report could describe: set `fsdp_state_dict_type: "
                f"FULL_STATE_DICT`, {off}."
            )
    parallel = accelerator.parallelism_config
    if parallel is not None and max(parallel.tp_size, parallel.cp_size, parallel.sp_size) > 1:
        raise ValueError(
            f"AGL runs on data parallelism alone: leave tensor, context and sequence parallelism out, {off}."
        )
    checkpointing = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if checkpointing and accelerator.num_processes > 1 and not fsdp:
        raise ValueError(
            "Reentrant gradient checkpointing marks the adapter ready before the penalty has used it, which DDP refuses: leave "
            "`use_reentrant` out of `gradient_checkpointing_kwargs`."
        )
