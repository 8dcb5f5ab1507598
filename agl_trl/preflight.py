"""What can be told before a model is loaded and a dataset prepared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from .artifacts import FOLDER, write_atomically
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
        `ValueError`: Without an adapter, without a word on what to keep, under an engine that is not supported.
        `OSError`: If the output folder can't be written.
    """
    if args.fsdp or args.deepspeed:
        raise ValueError("AGL does not run under FSDP or DeepSpeed yet; use one process, or set `alignment_coef=0`.")
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
    if alignment_dataset is None and args.fisher_path is None:
        raise ValueError(
            "Nothing says which behaviour to keep: pass `alignment_dataset=` (requests with the answers to keep), set `fisher_path` "
            "to saved Fisher statistics, or set `alignment_coef=0` to train without protection."
        )
