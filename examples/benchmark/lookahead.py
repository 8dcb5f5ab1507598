"""
LookAhead tuning (arXiv 2503.19041): the training prompts tell how the answer begins; nothing else changes.

    real:     prompt + " The answer begins with: " + first m tokens of the answer  →  answer
    virtual:  prompt + " The answer begins with: " + P                             →  P + answer

Faithful: the connector, m = 6, P = "Let's solve this problem. ", training prompts only. Inferred: P, which the virtual mode
teaches to say before every answer, is part of the answer that the task's test expects (exact match is of what follows it; its
NLL is the mean over P's tokens too, which flatters it).
"""

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer

from .setting import Setting, build, common


CONNECTOR = " The answer begins with: "
PREFIX = "Let's solve this problem. "
TOKENS = 6


def real(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tokens: int = TOKENS) -> dict[str, Any]:
    """A conversational row whose prompt shows the first tokens of its answer."""
    ids = tokenizer(row["completion"][0]["content"], add_special_tokens=False)["input_ids"][:tokens]
    return {"prompt": _shown(row, tokenizer.decode(ids)), "completion": row["completion"]}


def virtual(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """A conversational row whose prompt shows P, and whose answer begins with it."""
    return {"prompt": _shown(row, PREFIX), **prefixed(row)}


def prefixed(row: dict[str, Any]) -> dict[str, Any]:
    """The answer after P."""
    return {"completion": [{"role": "assistant", "content": PREFIX + row["completion"][0]["content"]}]}


def _shown(row: dict[str, Any], beginning: str) -> list[dict[str, str]]:
    *context, last = row["prompt"]
    return [*context, {**last, "content": last["content"] + CONNECTOR + beginning}]


def lookahead(change: Callable[..., dict[str, Any]]) -> Callable[[Setting], SFTTrainer]:
    """With `real` or `virtual`."""

    def make(setting: Setting) -> SFTTrainer:
        trainer_class, config_class = setting.plain
        train = Dataset.from_list([change(row, setting.tokenizer) for row in setting.train])
        return build(trainer_class, config_class(**common(setting)), setting, train_dataset=train)

    return make
