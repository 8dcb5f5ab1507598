"""Training arguments of the AGL trainers: TRL's, and those of AlignGuard-LoRA."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trl import SFTConfig


FISHER_TYPES = ("projection", "empirical", "mc")


if TYPE_CHECKING:  # for the type checker the mixin extends the config it is mixed into
    from trl import SFTConfig as _Parent
else:
    _Parent = object


@dataclass
class AGLConfigMixin(_Parent):
    """
    Arguments that the AGL trainers add to those of the TRL trainer. Symbols are those of AlignGuard-LoRA
    (https://huggingface.co/papers/2508.02079).

    Parameters:
        alignment_coef (`float`, *optional*, defaults to `3.0`):
            Weight λ_A of the alignment penalty: mean over the adapted layers of ‖ΔW‖²_F / ‖W‖²_F in the Fisher metric of
            the alignment rows. `0.0` switches AGL off; the trainer is then exactly its TRL parent.
        fisher_path (`str`, *optional*):
            Folder or file with saved Fisher statistics. The run then needs no alignment dataset, and takes type, damping
            and rank from the file.
        fisher_type (`str`, *optional*, defaults to `"projection"`):
            What is differentiated for the output side G of the Fisher: `"projection"`, `"empirical"` or `"mc"`. Only read
            when `fisher_damping` is below 1.
        fisher_damping (`float`, *optional*, defaults to `1.0`):
            δ in G_δ = (1 − δ) G / mean_eig(G) + δ I. `1.0` is the activation metric E‖ΔW x‖², which takes forward passes
            only.
        fisher_rank (`int`, *optional*, defaults to `64`):
            Number k of eigenpairs kept per covariance; the rest is kept as its mean.
        fisher_num_samples (`int`, *optional*, defaults to `256`):
            Number of alignment rows the statistics are taken over; `None` takes all.
        fisher_batch_size (`int`, *optional*, defaults to `8`):
            Rows per forward pass of the statistics.
    """

    alignment_coef: float = field(
        default=3.0,
        metadata={
            "help": "Weight lambda_A of the alignment penalty: mean over the adapted layers of |dW|^2 / |W|^2 in the Fisher "
            "metric of the alignment rows. `0.0` switches AGL off; the trainer is then exactly its TRL parent."
        },
    )
    fisher_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or file with saved Fisher statistics. The run then needs no alignment dataset, and takes type, "
            "damping and rank from the file."
        },
    )
    fisher_type: str = field(
        default="projection",
        metadata={
            "help": "What is differentiated for the output side G of the Fisher: `projection`, `empirical` or `mc`. Only read "
            "when `fisher_damping` is below 1.",
            "choices": FISHER_TYPES,
        },
    )
    fisher_damping: float = field(
        default=1.0,
        metadata={
            "help": "delta in G_delta = (1 - delta) G / mean_eig(G) + delta I. `1.0` is the activation metric, which takes "
            "forward passes only."
        },
    )
    fisher_rank: int = field(
        default=64,
        metadata={"help": "Number k of eigenpairs kept per covariance; the rest is kept as its mean."},
    )
    fisher_num_samples: int | None = field(
        default=256,
        metadata={"help": "Number of alignment rows the statistics are taken over; `None` takes all."},
    )
    fisher_batch_size: int = field(
        default=8,
        metadata={"help": "Rows per forward pass of the statistics."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.alignment_coef < 0:
            raise ValueError(f"`alignment_coef` must not be negative, got {self.alignment_coef}.")
        if not 0 <= self.fisher_damping <= 1:
            raise ValueError(f"`fisher_damping` must lie between 0 and 1, got {self.fisher_damping}.")
        if self.fisher_type not in FISHER_TYPES:
            raise ValueError(f"`fisher_type` must be one of {', '.join(FISHER_TYPES)}, got {self.fisher_type!r}.")
        for name in ("fisher_rank", "fisher_batch_size", "fisher_num_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")


@dataclass
class AGLSFTConfig(AGLConfigMixin, SFTConfig):
    """
    Training arguments of the [`AGLSFTTrainer`]: those of [`~trl.SFTConfig`] and those of [`AGLConfigMixin`].
    """
