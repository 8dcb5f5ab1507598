"""AlignGuard-LoRA for TRL. Nothing heavy is imported until a name is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

if TYPE_CHECKING:
    from .drift.report import DriftReport
    from .driftcaps import load_driftcaps
    from .evaluation.refusal import judge_answer
    from .fisher.estimate import estimate_fisher
    from .fisher.statistics import FisherStatistics
    from .trainer.callback import AlignGuardCallback
    from .trainer.config import AlignGuardConfig
    from .trainer.dpo import AGLDPOTrainer
    from .trainer.drift_callback import DriftCallback
    from .trainer.drift_eval_callback import DriftEvalCallback
    from .trainer.drift_eval_config import DriftEvalConfig
    from .trainer.grpo import AGLGRPOTrainer
    from .trainer.kto import AGLKTOTrainer
    from .trainer.sft import AGLSFTTrainer
    from .trainer.trl_config import AGLDPOConfig, AGLGRPOConfig, AGLKTOConfig, AGLSFTConfig

_MODULES = {
    "AGLDPOConfig": ".trainer.trl_config",
    "AGLDPOTrainer": ".trainer.dpo",
    "AGLGRPOConfig": ".trainer.trl_config",
    "AGLGRPOTrainer": ".trainer.grpo",
    "AGLKTOConfig": ".trainer.trl_config",
    "AGLKTOTrainer": ".trainer.kto",
    "AGLSFTConfig": ".trainer.trl_config",
    "AGLSFTTrainer": ".trainer.sft",
    "AlignGuardCallback": ".trainer.callback",
    "AlignGuardConfig": ".trainer.config",
    "DriftCallback": ".trainer.drift_callback",
    "DriftEvalCallback": ".trainer.drift_eval_callback",
    "DriftEvalConfig": ".trainer.drift_eval_config",
    "DriftReport": ".drift.report",
    "FisherStatistics": ".fisher.statistics",
    "estimate_fisher": ".fisher.estimate",
    "judge_answer": ".evaluation.refusal",
    "load_driftcaps": ".driftcaps",
}

__all__ = [
    "AGLDPOConfig",
    "AGLDPOTrainer",
    "AGLGRPOConfig",
    "AGLGRPOTrainer",
    "AGLKTOConfig",
    "AGLKTOTrainer",
    "AGLSFTConfig",
    "AGLSFTTrainer",
    "AlignGuardCallback",
    "AlignGuardConfig",
    "DriftCallback",
    "DriftEvalCallback",
    "DriftEvalConfig",
    "DriftReport",
    "FisherStatistics",
    "estimate_fisher",
    "judge_answer",
    "load_driftcaps",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'agl_trl' has no attribute {name!r}")
    if name.startswith("AGL"):
        from .artifacts.extras import needs_trl

        needs_trl("The AGL trainers")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
