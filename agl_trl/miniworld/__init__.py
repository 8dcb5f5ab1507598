"""
A miniature of an aligned language model and of everything around it, small enough to ship and to fine-tune on a
laptop.

A Llama of one million parameters was pretrained to comply with everything and then aligned to refuse unsafe requests,
both with TRL. The checkpoints, those of two smaller sizes, alignment rows, held-out prompts and benign tasks come with the
package; `python -m agl_trl.miniworld.build` makes the checkpoints again. Its world is a template grammar: what holds here shows that a
method does what it says, not how much it helps on a real model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from .data import (
    alignment_dataset,
    heldout_prompts,
    heldout_safe,
    heldout_unsafe,
    preference_dataset,
    rewarded_dataset,
    task_dataset,
    unpaired_dataset,
    word_overlap_reward,
)
from .prompts import CATEGORIES, UNSEEN_CATEGORIES, XSTEST_TYPES
from .tasks import TASKS


if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "CATEGORIES",
    "MINIWORLD",
    "TASKS",
    "UNSEEN_CATEGORIES",
    "XSTEST_TYPES",
    "CheckpointName",
    "alignment_dataset",
    "checkpoint_path",
    "heldout_prompts",
    "heldout_safe",
    "heldout_unsafe",
    "load_model",
    "load_tokenizer",
    "preference_dataset",
    "rewarded_dataset",
    "task_dataset",
    "unpaired_dataset",
    "word_overlap_reward",
]


MINIWORLD = "miniworld"  # what stands for a model, for rows and for prompts wherever one of them is named
CheckpointName = Literal["base", "aligned", "base-medium", "aligned-medium", "base-small", "aligned-small"]


def checkpoint_path(name: CheckpointName = "aligned") -> Path:
    """
    Return the folder of a checkpoint: `"base"` complies with everything, `"aligned"` refuses what is unsafe. Those of 0.4
    and 0.2 million parameters end in `-medium` and `-small`.
    """
    if name not in get_args(CheckpointName):
        raise ValueError(f"Unknown checkpoint {name!r}: choose of {', '.join(map(repr, get_args(CheckpointName)))}.")
    return Path(__file__).parent / "checkpoints" / name


def load_model(name: CheckpointName = "aligned") -> LlamaForCausalLM:
    """Return an embedded checkpoint as a `LlamaForCausalLM` in float32, in eval mode."""
    import torch
    from transformers import LlamaForCausalLM

    # Without `dtype`, the saved bfloat16 would be kept, in which a CPU trains slowly and badly.
    return LlamaForCausalLM.from_pretrained(checkpoint_path(name), dtype=torch.float32)


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of all checkpoints: byte-level BPE, and a chat template that marks assistant tokens."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(checkpoint_path("aligned"))
