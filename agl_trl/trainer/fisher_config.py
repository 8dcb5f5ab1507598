"""Options of the Fisher statistics of a run: where they come from, or how they are taken."""

import warnings
from dataclasses import dataclass, field
from typing import get_args

from ..fisher.estimate import FisherType


@dataclass(kw_only=True)
class FisherConfig:
    """
    Configuration of the statistics, part of [`AlignGuardConfig`].

    Parameters:
        fisher_path (`str`, *optional*):
            Folder, file or Hub id with saved Fisher statistics. The run then needs no alignment dataset: it takes type, shrinkage and
            rank from the file, and reference answers from beside it, where there are any.
        push_fisher (`bool`, *optional*, defaults to `True`):
            Whether the Fisher statistics are pushed to the Hub with the adapter. They say a little about the alignment rows
            (directions and sizes of activations); `False` keeps them, and the reference answers, on this machine.
        fisher_type (`str`, *optional*, defaults to `"projection"`):
            What is differentiated for the output side G of the Fisher: `"projection"`, `"empirical"` or `"mc"`. Only read
            when `fisher_shrinkage` is below 1.
        fisher_shrinkage (`float`, *optional*, defaults to `1.0`):
            δ in G_δ = (1 − δ) G / mean_eig(G) + δ I. `1.0` is the activation metric E‖ΔW x‖², which takes forward passes
            only.
        fisher_rank (`int`, *optional*, defaults to `64`):
            Number k of eigenpairs kept per covariance; the rest is kept as its mean.
        fisher_num_samples (`int`, *optional*, defaults to `256`):
            Number of alignment rows the statistics are taken over; `None` takes all.
        fisher_batch_size (`int`, *optional*, defaults to `8`):
            Rows per forward pass of the statistics.
        fisher_max_length (`int`, *optional*, defaults to `1024`):
            Longer alignment rows lose their end.
        fisher_damping (`float`, *optional*):
            Former name of `fisher_shrinkage`; still read.

    Raises:
        `ValueError`: If a value can't be.
    """

    fisher_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder, file or Hub id with saved Fisher statistics. The run then needs no alignment dataset, and takes type, "
            "shrinkage and rank from the file."
        },
    )
    push_fisher: bool = field(
        default=True,
        metadata={"help": "Whether the Fisher statistics are pushed to the Hub with the adapter."},
    )
    fisher_type: FisherType = field(
        default="projection",
        metadata={
            "help": "What is differentiated for the output side G of the Fisher: `projection`, `empirical` or `mc`. Only read "
            "when `fisher_shrinkage` is below 1."
        },
    )
    fisher_shrinkage: float = field(
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
    fisher_max_length: int | None = field(
        default=1024,
        metadata={"help": "Longer alignment rows lose their end."},
    )
    fisher_damping: float | None = field(
        default=None,
        metadata={"help": "Former name of `fisher_shrinkage`; still read."},
    )

    def __post_init__(self):
        if self.fisher_damping is not None:
            warnings.warn("`fisher_damping` is called `fisher_shrinkage` now.", FutureWarning, stacklevel=4)
            self.fisher_shrinkage, self.fisher_damping = self.fisher_damping, None
        if not 0 <= self.fisher_shrinkage <= 1:
            raise ValueError(f"`fisher_shrinkage` must lie between 0 and 1, got {self.fisher_shrinkage}.")
        for name in ("fisher_rank", "fisher_batch_size", "fisher_num_samples", "fisher_max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.fisher_type not in get_args(FisherType):
            raise ValueError(f"`fisher_type` must be one of {get_args(FisherType)}, got {self.fisher_type!r}.")
