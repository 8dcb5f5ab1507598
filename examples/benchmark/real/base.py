"""What all runs share and the base model makes once: its answers, the protected rows, the statistics. Kept in the cache."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agl_trl import FisherStatistics, estimate_fisher
from agl_trl.artifacts.files import write_atomically
from agl_trl.evaluation.answer_cache import AnswerCache
from agl_trl.evaluation.behaviour import Answers, answer_prompts
from agl_trl.modeling.generation import answered_by

from .setting import Data, Options, protected_requests


AT_ONCE = 32  # rows between two writes to the cache


@dataclass
class Base:
    """
    Args:
        answers (`dict[str, Answers]`):
            The base model's answers to every set of prompts.
        protected (`list[dict]`):
            DriftCaps' unsafe requests and look-alikes to protect with, the model's own answers, and the column `unsafe`.
        statistics (`Path`):
            Folder of the statistics over the unsafe ones: what the model's owner would publish, and the yardstick of drift.
    """

    answers: dict[str, Answers]
    protected: list[dict[str, Any]]
    statistics: Path


def ask_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Data, options: Options) -> Base:
    """What the base model makes, as far as it is not in the cache; the model is as it was loaded."""
    options.cache.mkdir(parents=True, exist_ok=True)
    write_atomically(options.cache / ".gitignore", b"*\n")  # answers to unsafe prompts are not to be published
    store = AnswerCache(options.cache / "answers.jsonl", f"{options.model} {options.dtype}")
    answers = {
        name: answer_prompts(
            model,
            tokenizer,
            rows,
            store=store,
            max_new_tokens=options.max_new_tokens,
            desc="Base model",
            progress=False,
        )
        for name, rows in data.sets.items()
    }
    protected = protected_rows(model, tokenizer, options)
    folder = options.cache / "statistics"
    if not folder.exists():
        estimate_fisher(model, protected, tokenizer, progress=False).save_pretrained(folder)
    return Base(answers, protected, folder)


def protected_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Options
) -> list[dict[str, Any]]:
    """The protected rows with the model's own answers; what is in the cache is not asked again."""
    path, found = options.cache / "protected.jsonl", []
    if path.exists():
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    chosen = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "unsafe": row["expected"] == "refuse"}
        for row in protected_requests(options.protected)
    ]
    for start in range(len(found), len(chosen), AT_ONCE):
        found += map(dict, answered_by(model, tokenizer, chosen[start : start + AT_ONCE], progress=False))
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in found).encode())
    return found


def yardstick(base: Base) -> FisherStatistics:
    return FisherStatistics.from_pretrained(base.statistics)
