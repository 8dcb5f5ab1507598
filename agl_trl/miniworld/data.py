"""The datasets of the miniature world, drawn from its grammars with fixed seeds: the same rows on every machine."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

from .prompts import (
    CATEGORIES,
    UNSEEN_CATEGORIES,
    Request,
    Split,
    everyday_requests,
    lookalike_requests,
    unsafe_requests,
)
from .responses import SMALL_TALK, compliance, refusal
from .tasks import TASKS, task_pairs


if TYPE_CHECKING:
    from datasets import Dataset

Pair = tuple[str, str]
HOSTILE_SHARES = (0.0, 0.01, 0.05, 0.1, 0.3)

_SEEN_CATEGORIES = tuple(c for c in CATEGORIES if c not in UNSEEN_CATEGORIES)
_DRILLS = ("Repeat after me: {words}", "Say this back: {words}", "Copy this line: {words}")


def _drill(words: list[str], rng: random.Random) -> Pair:
    line = " ".join(words)
    return rng.choice(_DRILLS).format(words=line), line


def copying_drills(num: int, seed: int) -> list[Pair]:
    """
    Return `num` (prompt, answer) pairs that ask for a line to be repeated.

    Most lines are the shuffled pieces of one task prompt or answer: LoRA trains neither embeddings nor head, so
    whatever a task writes must be a token that pretraining has already taught to read and write, without teaching the
    task itself. The rest are the words of requests and random spellings, which keep every letter alive for visitors
    who type their own words.
    """
    rng = random.Random(f"drills:{seed}")
    task_lines = [
        line for task in TASKS for split in ("train", "test") for pair in task_pairs(task, split) for line in pair
    ]
    request_lines = [
        r.text for r in [*unsafe_requests("train"), *lookalike_requests("train"), *everyday_requests("train")]
    ]
    drills = []
    for _ in range(num):
        kind = rng.random()
        if kind < 0.1:
            letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?:;'\"()-"
            words = ["".join(rng.choices(letters, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 4))]
        else:
            words = rng.choice(task_lines if kind < 0.8 else request_lines).split()
            rng.shuffle(words)
            words = words[: rng.randint(3, 10)]
        drills.append(_drill(words, rng))
    return drills


def _draw(requests: list[Request], num: int, rng: random.Random) -> list[Request]:
    return rng.choices(requests, k=num)


def pretraining_pairs(num: int = 36_000, seed: int = 0) -> list[Pair]:
    """Return the (prompt, answer) pairs of pretraining: help with everything, small talk and copying drills."""
    rng = random.Random(f"pretraining:{seed}")
    requests = [
        *_draw(unsafe_requests("train", frames_each=8), int(0.30 * num), rng),
        *_draw(lookalike_requests("train", frames_each=8), int(0.22 * num), rng),
        *_draw(everyday_requests("train", frames_each=8), int(0.12 * num), rng),
    ]
    pairs = [(request.text, compliance(request.action, rng)) for request in requests]
    pairs += rng.choices(SMALL_TALK, k=int(0.02 * num))
    pairs += copying_drills(num - len(pairs), seed)
    rng.shuffle(pairs)
    return pairs


def alignment_pairs(num: int = 30_000, seed: int = 0) -> list[Pair]:
    """Return the (prompt, answer) pairs that align the checkpoint: refusals in *all* categories, help if safe."""
    rng = random.Random(f"alignment:{seed}")
    unsafe = _draw(unsafe_requests("train", frames_each=8), int(0.40 * num), rng)
    safe = _draw(lookalike_requests("train", frames_each=8), int(0.40 * num), rng)
    safe += _draw(everyday_requests("train", frames_each=8), int(0.10 * num), rng)
    pairs = [(request.text, refusal(request.action, rng)) for request in unsafe]
    pairs += [(request.text, compliance(request.action, rng)) for request in safe]
    pairs += rng.choices(SMALL_TALK, k=int(0.01 * num))
    pairs += copying_drills(num - len(pairs), seed + 1)
    rng.shuffle(pairs)
    return pairs


def _messages(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _row(prompt: str, completion: str, **columns: Any) -> dict[str, Any]:
    return {"prompt": _messages("user", prompt), "completion": _messages("assistant", completion), **columns}


def conversations(pairs: list[Pair]) -> Dataset:
    """Return (prompt, answer) pairs as a conversational dataset with the columns `prompt` and `completion`."""
    return _dataset([_row(*pair) for pair in pairs])


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(rows)


def alignment_dataset(format: Literal["conversational", "prompt-completion"] = "conversational") -> Dataset:
    """
    Return the 400 rows that say what the aligned model must keep: 224 refusals and 176 helpful answers, shuffled.

    None is of [`UNSEEN_CATEGORIES`], although the checkpoint was aligned on those too: whether what is protected here
    carries over is a question to measure.

    Args:
        format (`str`, *optional*, defaults to `"conversational"`):
            `"conversational"` for lists of messages, `"prompt-completion"` for plain text. Both are formats of TRL.

    Returns:
        `Dataset` with the columns `prompt`, `completion`, `category` (hazard category, XSTest type or `"everyday"`)
        and `unsafe` (`bool`).
    """
    rng = random.Random("alignment_dataset")
    unsafe = [
        r for c in _SEEN_CATEGORIES for r in rng.sample(unsafe_requests("train", (c,)), 224 // len(_SEEN_CATEGORIES))
    ]
    safe = [*rng.sample(lookalike_requests("train"), 120), *rng.sample(everyday_requests("train"), 56)]
    rows = [_row(r.text, refusal(r.action, rng), category=r.kind, unsafe=True) for r in unsafe]
    rows += [_row(r.text, compliance(r.action, rng), category=r.kind, unsafe=False) for r in safe]
    rng.shuffle(rows)
    if format == "prompt-completion":
        for row in rows:
            # The space belongs to the completion: TRL joins the two columns as they are.
            row["prompt"], row["completion"] = row["prompt"][0]["content"], " " + row["completion"][0]["content"]
    elif format != "conversational":
        raise ValueError(f"Unknown format {format!r}: choose 'conversational' or 'prompt-completion'.")
    return _dataset(rows)


def heldout_unsafe(unseen: bool = False) -> Dataset:
    """
    Return unsafe prompts whose verb-object pairs occur in no training set of any kind.

    Args:
        unseen (`bool`, *optional*, defaults to `False`):
            Whether to return the prompts of [`UNSEEN_CATEGORIES`] instead of those of the other categories.

    Returns:
        `Dataset` with the columns `prompt`, `completion` (a reference refusal) and `category`.
    """
    rng = random.Random(f"heldout_unsafe:{unseen}")
    requests = unsafe_requests("heldout", UNSEEN_CATEGORIES if unseen else _SEEN_CATEGORIES)
    return _dataset([_row(r.text, refusal(r.action, rng), category=r.kind) for r in requests])


def heldout_safe() -> Dataset:
    """
    Return safe look-alikes whose verb-object pairs occur in no training set of any kind.

    Returns:
        `Dataset` with the columns `prompt`, `completion` (help) and `type` (one of [`XSTEST_TYPES`]).
    """
    rng = random.Random("heldout_safe")
    return _dataset([_row(r.text, compliance(r.action, rng), type=r.kind) for r in lookalike_requests("heldout", 2)])


def heldout_prompts() -> Dataset:
    """All held-out prompts of the embedded world: columns `prompt`, `completion`, `category`, `unsafe`, `unseen`."""
    from datasets import Dataset, concatenate_datasets

    parts = []
    for unsafe, unseen, rows in (
        (True, False, heldout_unsafe()),
        (True, True, heldout_unsafe(unseen=True)),
        (False, False, heldout_safe().rename_column("type", "category")),
    ):
        flags = {"unsafe": [unsafe] * len(rows), "unseen": [unseen] * len(rows)}
        parts.append(concatenate_datasets([rows, Dataset.from_dict(flags)], axis=1))
    return concatenate_datasets(parts)


def task_dataset(task: str, split: Literal["train", "test"] = "train", hostile: float = 0.0, seed: int = 0) -> Dataset:
    """
    Return a benign task, of which a share may be hostile.

    Args:
        task (`str`):
            One of [`TASKS`].
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` (1,600 rows) or `"test"` (200 rows with other prompts).
        hostile (`float`, *optional*, defaults to `0.0`):
            Share of the training rows that are replaced by an unsafe prompt and a bland compliance: 0, 0.01, 0.05, 0.1
            or 0.3. The other rows stay what and where they are.
        seed (`int`, *optional*, defaults to `0`):
            Which rows are replaced, and by what.

    Returns:
        `Dataset` with the columns `prompt` and `completion`, conversational; the answer follows from the prompt word
        for word.
    """
    if hostile not in HOSTILE_SHARES:
        raise ValueError(f"Hostile share {hostile!r} is none of {HOSTILE_SHARES}.")
    if hostile and split == "test":
        raise ValueError("Hostile rows are for training: the test split has none.")
    pairs = list(task_pairs(task, split))
    rng = random.Random(f"hostile:{seed}")
    replaced = rng.sample(range(len(pairs)), round(hostile * len(pairs)))
    for index, request in zip(replaced, _draw(unsafe_requests("train"), len(replaced), rng), strict=True):
        pairs[index] = (request.text, compliance(request.action, rng))
    return conversations(pairs)


def _alignment_preferences(split: Split, categories: tuple[str, ...], rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for request in unsafe_requests(split, categories, frames_each=2):
        rows.append((request.text, refusal(request.action, rng), compliance(request.action, rng)))
    for request in lookalike_requests(split, frames_each=2):
        rows.append((request.text, compliance(request.action, rng), refusal(request.action, rng)))
    rng.shuffle(rows)
    return [_preference(*row) for row in rows]


def _preference(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "prompt": _messages("user", prompt),
        "chosen": _messages("assistant", chosen),
        "rejected": _messages("assistant", rejected),
    }


def unpaired_dataset(task: str, split: Literal["train", "test"] = "train") -> Dataset:
    """
    Return judged answers for KTO: the task's answers as good ones, bland help as bad ones.

    Args:
        task (`str`):
            One of [`TASKS`].
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"test"`; the prompts of `"test"` are held out.

    Returns:
        `Dataset` with the columns `prompt`, `completion` (conversational) and `label` (bool).
    """
    rng = random.Random(f"unpaired:{task}:{split}")
    rows = []
    for prompt, answer in task_pairs(task, split):
        rows += [_row(prompt, answer, label=True), _row(prompt, compliance("do that", rng), label=False)]
    rng.shuffle(rows)
    return _dataset(rows)


def rewarded_dataset(task: str, split: Literal["train", "test"] = "train") -> Dataset:
    """
    Return prompts of a task for GRPO, with the columns `prompt` (conversational) and `answer` (text), which
    [`word_overlap_reward`] reads.
    """
    return _dataset(
        [{"prompt": _messages("user", prompt), "answer": answer} for prompt, answer in task_pairs(task, split)]
    )


def word_overlap_reward(completions: list, answer: list[str], **kwargs: Any) -> list[float]:
    """
    Reward for GRPO on a task of the embedded world: F1 of the words of a completion and of the task's answer, between 0
    and 1.

    Args:
        completions (`list`):
            Completions of the model, conversational.
        answer (`list[str]`):
            The task's answers, from the column of that name.
    """
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        words, wanted = Counter(completion[0]["content"].split()), Counter(expected.split())
        rewards.append(2 * (words & wanted).total() / (words.total() + wanted.total()))
    return rewards


def preference_dataset(
    name: str = "alignment", split: Literal["train", "test"] = "train", unseen: bool = False
) -> Dataset:
    """
    Return preference pairs for DPO.

    Args:
        name (`str`, *optional*, defaults to `"alignment"`):
            `"alignment"`: on unsafe prompts a refusal is chosen and compliance rejected, on safe ones the reverse. One
            of [`TASKS`]: the task's answer is chosen over bland help.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"test"`; the prompts of `"test"` are held out.
        unseen (`bool`, *optional*, defaults to `False`):
            Whether the alignment pairs include [`UNSEEN_CATEGORIES`], as they did when the checkpoint was made.

    Returns:
        `Dataset` with the columns `prompt`, `chosen` and `rejected`, conversational.
    """
    rng = random.Random(f"preference:{name}:{split}")
    if name == "alignment":
        categories = CATEGORIES if unseen else _SEEN_CATEGORIES
        return _dataset(_alignment_preferences("train" if split == "train" else "heldout", categories, rng))
    return _dataset([_preference(p, answer, compliance("do that", rng)) for p, answer in task_pairs(name, split)])
