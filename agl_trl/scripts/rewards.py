"""Reward functions of the GRPO script by name."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from trl import rewards

from .training import AGLScriptArguments


# Those that TRL's script knows by name.
KNOWN: dict[str, Callable[..., Any]] = {
    "accuracy_reward": rewards.accuracy_reward,
    "reasoning_accuracy_reward": rewards.reasoning_accuracy_reward,
    "think_format_reward": rewards.think_format_reward,
    "get_soft_overlong_punishment": rewards.get_soft_overlong_punishment(
        max_completion_len=1280, soft_punish_cache=256
    ),
}


@dataclass
class AGLGRPOScriptArguments(AGLScriptArguments):
    """
    Arguments of the GRPO script: those of all scripts, and what is rewarded.

    Args:
        reward_model_name_or_path (`str`, *optional*):
            Reward model, on the Hub or in a folder.
        reward_funcs (`list[str]`, *optional*):
            Reward functions: `accuracy_reward`, `reasoning_accuracy_reward`, `think_format_reward`,
            `get_soft_overlong_punishment`, or a dotted path such as `my_lib.rewards.custom_reward`.
    """

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model, on the Hub or in a folder."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: `accuracy_reward`, `reasoning_accuracy_reward`, `think_format_reward`, "
            "`get_soft_overlong_punishment`, or a dotted path such as `my_lib.rewards.custom_reward`."
        },
    )


def load_rewards(model: str | None, names: list[str] | None) -> list[str | Callable[..., Any]]:
    """
    Rewards as the trainer takes them.

    Args:
        model (`str`, *optional*):
            Reward model.
        names (`list[str]`, *optional*):
            Names or dotted paths of reward functions.

    Raises:
        `SystemExit`: If nothing is named, or there is no such function: one sentence, exit code 1.
    """
    found: list[str | Callable[..., Any]] = [] if model is None else [model]
    for name in names or []:
        module, _, function = name.rpartition(".")
        if name in KNOWN:
            found.append(KNOWN[name])
            continue
        if not module:
            sys.exit(f"There is no reward function '{name}': name {', '.join(KNOWN)}, or a dotted path.")
        sys.path.insert(0, os.getcwd())  # as TRL's script does
        try:
            found.append(getattr(import_module(module), function))
        except (ImportError, AttributeError) as error:
            sys.exit(f"The reward function '{name}' can't be imported: {error}.")
    if not found:
        sys.exit("Nothing is rewarded: set `reward_funcs` or `reward_model_name_or_path`.")
    return found
