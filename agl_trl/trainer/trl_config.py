"""Arguments of the AGL trainers: those of TRL's, and those of AlignGuard-LoRA."""

from dataclasses import dataclass

from trl import DPOConfig, GRPOConfig, KTOConfig, SFTConfig

from .config import AlignGuardConfig


@dataclass
class AGLSFTConfig(AlignGuardConfig, SFTConfig):
    """
    Training arguments of [`AGLSFTTrainer`]: those of [`~trl.SFTConfig`] and those of [`AlignGuardConfig`].

    Example:

    ```python
    args = AGLSFTConfig("outputs", learning_rate=2e-4, kl_budget=0.02)
    ```
    """

    def __post_init__(self):
        SFTConfig.__post_init__(self)
        AlignGuardConfig.__post_init__(self)


@dataclass
class AGLDPOConfig(AlignGuardConfig, DPOConfig):
    """
    Training arguments of [`AGLDPOTrainer`]: those of [`~trl.DPOConfig`] and those of [`AlignGuardConfig`].

    Example:

    ```python
    args = AGLDPOConfig("outputs", beta=0.1, kl_budget=0.02)
    ```
    """

    def __post_init__(self):
        DPOConfig.__post_init__(self)
        AlignGuardConfig.__post_init__(self)


@dataclass
class AGLGRPOConfig(AlignGuardConfig, GRPOConfig):
    """
    Training arguments of [`AGLGRPOTrainer`]: those of [`~trl.GRPOConfig`] and those of [`AlignGuardConfig`].

    Example:

    ```python
    args = AGLGRPOConfig("outputs", num_generations=8, kl_budget=0.02)
    ```
    """

    def __post_init__(self):
        GRPOConfig.__post_init__(self)
        AlignGuardConfig.__post_init__(self)


@dataclass
class AGLKTOConfig(AlignGuardConfig, KTOConfig):
    """
    Training arguments of [`AGLKTOTrainer`]: those of [`~trl.KTOConfig`] and those of [`AlignGuardConfig`].

    Example:

    ```python
    args = AGLKTOConfig("outputs", beta=0.1, kl_budget=0.02)
    ```
    """

    def __post_init__(self):
        KTOConfig.__post_init__(self)
        AlignGuardConfig.__post_init__(self)
