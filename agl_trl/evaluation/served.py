"""Base and tuned model behind servers, side by side: answers and verdicts alone, since a server shows neither weights nor logits."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from ..data.labels import unsafe_column
from ..data.rows import Row, check_content, prompt_text, questions_of, row_name
from .answer_cache import AnswerCache
from .answers import Answers, answer_until, count_unasked
from .behaviour import Behaviour, compare
from .engine import ServedAnswer, ServedModel, request_of
from .judges import Judge, StringJudge
from .probes import unmeasured
from .rates import binomial_test


UNSEEN = "KL, likelihood of reference answers, refusal margin, hidden states: a server shows answers alone"
AT_ONCE = 8  # requests; a server that batches is busy with so many, one that doesn't has few to wait for


def measure_served(
    base: ServedModel,
    tuned: ServedModel,
    prompts: Dataset,
    *,
    judge: Judge | None = None,
    store: AnswerCache | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: bool = True,
    certain: Callable[[Tensor, Tensor, Tensor, Tensor], bool] | None = None,
) -> Behaviour:
    """
    Ask two served models the same prompts. What needs logits (KL, likelihoods, margin, hidden states) is NaN.

    Args:
        base, tuned ([`ServedModel`]):
            Models, of one server or of two.
        prompts (`Dataset`):
            As in [`measure_behaviour`]; plain texts go to the server as they are.
        judge, store, max_new_tokens, progress, certain:
            As in [`measure_behaviour`].
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts between two looks of `certain`; at most so many, and never more than 8, are asked at once.

    Raises:
        `ValueError`: If a row can't be read.
        [`EngineError`]: If a server fails; answers that were there are kept.
        [`MissingExtra`]: If scipy is not installed, without which nothing can be said of the answers.
    """
    binomial_test()  # told now, not when all prompts are answered
    for number, columns in enumerate(prompts):
        question = Row(columns, number)
        check_content(question["prompt"], row_name(question), "prompt")
        request_of(question)
    judge, unasked = judge or StringJudge(), {}
    options: dict[str, Any] = dict(
        judge=judge, store=store, max_new_tokens=max_new_tokens, at_once=min(AT_ONCE, batch_size), progress=progress
    )
    before = answer_served(base, prompts, desc="Base model", **options)

    def ask(some: Dataset) -> Answers:
        return answer_served(tuned, some, desc="Tuned model", **options)

    if certain is None:
        after = ask(prompts)
    else:
        chosen, after = answer_until(certain, before, ask, prompts, batch_size=batch_size)
        unasked = count_unasked(chosen, before.refused, unsafe_column(prompts))
        prompts, before = prompts.select(chosen), before.select(chosen)
    behaviour = compare(prompts, before, after, unmeasured(len(prompts)), judge)
    behaviour.metadata["kl_tokens"] = 0
    behaviour.metadata["served"] = {
        name: {"model": model.name, "url": model.url, "at_length": sum(answers.at_length)}
        for name, model, answers in (("base", base, before), ("tuned", tuned, after))
    }
    if unasked:
        behaviour.metadata["unasked"] = unasked
    return behaviour


def served_facts(served: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Which models a server was asked for, by name of the line; how many answers were as long as allowed."""
    return [
        (
            f"{side} model asked",
            f"{told['model']} at {told['url']}, {told['at_length']} of its answers were as long as allowed",
        )
        for side, told in served.items()
    ]


def answer_served(
    model: ServedModel,
    prompts: Dataset,
    *,
    judge: Judge,
    store: AnswerCache | None,
    max_new_tokens: int,
    at_once: int,
    desc: str,
    progress: bool,
) -> Answers:
    """Answers of one served model, kept as they arrive; arguments as in [`measure_served`]."""
    questions = questions_of(prompts)
    decoding = f"greedy (temperature 0) by a server, at most {max_new_tokens} tokens"
    keys = [] if store is None else [store.key(f"{desc}, {decoding}", str(question)) for question in questions]
    answers: dict[int, ServedAnswer] = {}
    if store is not None:
        answers = {
            i: ServedAnswer(*json.loads(store.answers[key])) for i, key in enumerate(keys) if key in store.answers
        }
    missing = [i for i in range(len(questions)) if i not in answers]
    pool = ThreadPoolExecutor(at_once)
    try:
        asked = {pool.submit(model.answer, questions[i], max_new_tokens): i for i in missing}
        for future in tqdm(as_completed(asked), total=len(asked), desc=desc, unit="prompt", disable=not progress):
            answer = answers[asked[future]] = future.result()
            if store is not None:
                store.add([keys[asked[future]]], [json.dumps(answer)])
    except BaseException:
        model.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    texts = [answers[i].text for i in range(len(questions))]
    verdicts = judge([prompt_text(question) for question in questions], texts)
    nll = torch.full((len(questions),), torch.nan)
    return Answers(texts, verdicts, nll, decoding, [answers[i].at_length for i in range(len(questions))])
