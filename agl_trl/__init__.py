"""AlignGuard-LoRA for TRL. Nothing heavy is imported until a name is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

if TYPE_CHECKING:
    from .drift.report import DriftReport
    from .fisher.estimate import estimate_fisher
    from .fisher.statistics import FisherStatistics
    from .trainer.base import AGLDPOTrainer, AGLSFTTrainer
    from .trainer.callback import DriftCallback
    from .trainer.config import AGLDPOConfig, AGLSFTConfig

_MODULES = {
    "AGLDPOConfig": ".trainer.config",
    "AGLDPOTrainer": ".trainer.base",
    "AGLSFTConfig": ".trainer.config",
    "AGLSFTTrainer": ".trainer.base",
    "DriftCallback": ".trainer.callback",
    "DriftReport": ".drift.report",
    "FisherStatistics": ".fisher.statistics",
    "estimate_fisher": ".fisher.estimate",
}

__all__ = [
    "AGLDPOConfig",
    "AGLDPOTrainer",
    "AGLSFTConfig",
    "AGLSFTTrainer",
    "DriftCallback",
    "DriftReport",
    "FisherStatistics",
    "estimate_fisher",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'agl_trl' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
