"""
Adapters of PEFT that are orthogonal by their form, in place of LoRA:

- `oft` (arXiv 2306.07280): `W ← W R`, with R block-diagonal and orthogonal, so that angles between the rows of W stay.
- `osf` (arXiv 2504.07097): of `W = U S Vᵀ` the leading k singular directions are frozen, the others trained, with gradients
  orthogonal to those that are frozen.

Data they need: none beside the task.

Faithful: both are PEFT's own, with its defaults: of OSF half of the directions are kept. Inferred: blocks of 8 for OFT, near LoRA's number of
parameters here; layers and schedule are those of the comparison, and so is OFT's learning rate, while OSF, which trains weights and
no factors, has a tenth of it. OSF rewrites the layers into their singular factors, so the result is read as ΔW, by layer.
"""

from collections.abc import Callable

from peft import OFTConfig, OSFConfig, PeftConfig
from trl import SFTConfig, SFTTrainer

from .setting import Setting, build, common


def adapter(peft_config: Callable[[], PeftConfig], **changes: float) -> Callable[[Setting], SFTTrainer]:
    """Plain SFT of an adapter of this kind, made anew for every run."""

    def make(setting: Setting) -> SFTTrainer:
        args = SFTConfig(**common(setting, **changes))
        return build(SFTTrainer, args, setting, peft_config=peft_config())

    return make


def oft(block_size: int = 8) -> Callable[[Setting], SFTTrainer]:
    """With the size of the blocks of R."""
    return adapter(lambda: OFTConfig(oft_block_size=block_size, target_modules="all-linear"))


def osf(kept: float = 0.5, learning_rate: float = 2e-4) -> Callable[[Setting], SFTTrainer]:
    """With the share of singular directions that is frozen."""
    return adapter(lambda: OSFConfig(effective_rank=kept, target_modules="all-linear"), learning_rate=learning_rate)
