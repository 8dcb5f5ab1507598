"""Answers of one model to prompts: greedy texts, their verdicts, and the likelihood of the reference answers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.rows import Messages, prompt_text, questions_of
from ..modeling.forward import context_length
from ..modeling.generation import end_tokens, generate_answers, opened_by_template
from ..modeling.likelihood import answer_nll
from .answer_cache import AnswerCache
from .judges import Judge, StringJudge
from .refusal import STILL_THINKING, Verdict


class Answers(NamedTuple):
    """
    What one model did with the prompts.

    Args:
        texts (`list[str]`):
            Greedy answers.
        verdicts (`list[Verdict]`):
            What the judge says of them.
        nll (`Tensor`):
            Negative log-likelihood per token of the reference answers, of shape `(prompts,)`, NaN where there is none.
        decoding (`str`):
            How the answers were made.
        at_length (`list[bool]`, *optional*, defaults to `()`):
            Of a served model, whether an answer ended because it was as long as allowed.
    """

    texts: list[str]
    verdicts: list[Verdict]
    nll: Tensor
    decoding: str
    at_length: Sequence[bool] = ()

    @property
    def refused(self) -> Tensor:
        """Boolean, of shape `(prompts,)`."""
        return torch.tensor([verdict.label == "refusal" for verdict in self.verdicts])

    @property
    def unfinished(self) -> Tensor:
        """Whether an answer was cut off while reasoning, boolean, of shape `(prompts,)`."""
        return torch.tensor([verdict == STILL_THINKING for verdict in self.verdicts])

    def select(self, places: list[int]) -> "Answers":
        """Those at these places, in that order."""
        verdicts = [self.verdicts[place] for place in places]
        at_length = [self.at_length[place] for place in places] if self.at_length else ()
        return Answers([self.texts[place] for place in places], verdicts, self.nll[places], self.decoding, at_length)


def answer_prompts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    *,
    judge: Judge | None = None,
    store: AnswerCache | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    end_token_ids: list[int] | None = None,
    desc: str = "Tuned model",
    progress: bool = True,
) -> Answers:
    """Answers of a model as it is; arguments as in [`measure_behaviour`] and [`generate_answers`]."""
    questions = questions_of(prompts)
    ends = end_tokens(tokenizer, model) if end_token_ids is None else end_token_ids
    context = context_length(model)
    decoding = (
        f"greedy, generation configs set aside, at most {max_new_tokens} tokens"
        f"{'' if context is None else f' ({context} with the prompt)'}, "
        f"{'until token ' + ' or '.join(map(str, ends)) if ends else 'without an end token'}"
    )
    texts = kept_answers(
        model,
        tokenizer,
        questions,
        store=store,
        kind=f"{desc}, {decoding}",
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        end_token_ids=ends,
        desc=desc,
        progress=progress,
    )
    nll = torch.full((len(prompts),), torch.nan)
    if "completion" in prompts.column_names:
        nll = answer_nll(model, tokenizer, prompts, batch_size=batch_size, max_length=None)
    judged = [opened_by_template(tokenizer, prompt) + text for prompt, text in zip(questions, texts, strict=True)]
    verdicts = (judge or StringJudge())([prompt_text(question) for question in questions], judged)
    return Answers(texts, verdicts, nll, decoding)


def kept_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Messages],
    *,
    store: AnswerCache | None,
    kind: str,
    **options: Any,
) -> list[str]:
    """
    Greedy answers, those that are kept as they are, and the others kept as soon as they are there.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Model as it is.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        prompts (`list`):
            Conversations or plain texts.
        store ([`AnswerCache`], *optional*):
            Where answers are kept.
        kind (`str`):
            Whose answers these are, and how they are made.
        options:
            Further arguments of [`generate_answers`].
    """
    if store is None:
        return generate_answers(model, tokenizer, prompts, **options)
    keys = [store.key(kind, str(prompt)) for prompt in prompts]
    missing = [i for i, key in enumerate(keys) if key not in store.answers]

    def keep(indices: list[int], answers: list[str]) -> None:
        store.add([keys[missing[index]] for index in indices], answers)

    generate_answers(model, tokenizer, [prompts[i] for i in missing], on_batch=keep, **options)
    return [store.answers[key] for key in keys]


def answer_until(
    certain: Callable[[Tensor, Tensor, Tensor, Tensor], bool],
    base: Answers,
    answer: Callable[[Dataset], Answers],
    prompts: Dataset,
    *,
    batch_size: int,
) -> tuple[list[int], Answers]:
    """
    Answers, batch by batch, until enough is known: the prompts that were asked, in their own order, and what was answered.

    Args:
        certain (`Callable`):
            As in [`measure_behaviour`].
        base ([`Answers`]):
            Answers of the base model to all prompts.
        answer (`Callable`):
            Asks the tuned model some of them.
        prompts (`Dataset`):
            All prompts.
        batch_size (`int`):
            Prompts per batch.
    """
    # Kinds and categories mixed.
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    asked, refused_tuned = torch.zeros(len(prompts), dtype=torch.bool), torch.zeros(len(prompts), dtype=torch.bool)
    unfinished = base.unfinished
    parts = []
    for start in range(0, len(prompts), batch_size):
        batch = order[start : start + batch_size]
        parts.append(answer(prompts.select(batch)))
        asked[batch], refused_tuned[batch] = True, parts[-1].refused
        unfinished[batch] |= parts[-1].unfinished
        if certain(base.refused, refused_tuned, asked, unfinished):
            break
    texts = [text for part in parts for text in part.texts]
    verdicts = [verdict for part in parts for verdict in part.verdicts]
    at_length = [flag for part in parts for flag in part.at_length]
    answers = Answers(texts, verdicts, torch.cat([part.nll for part in parts]), parts[0].decoding, at_length)
    places = sorted(range(len(texts)), key=order.__getitem__)
    return [order[place] for place in places], answers.select(places)


def count_unasked(chosen: list[int], refused_base: Tensor, unsafe: Tensor) -> dict[str, dict[str, int]]:
    """How many prompts of either kind were left, by what the base model did with them; nothing where none were."""
    left = torch.ones_like(unsafe)
    left[chosen] = False
    if not left.any():
        return {}
    return {
        name: {
            "refused": int((left & kind & refused_base).sum()),
            "answered": int((left & kind & ~refused_base).sum()),
        }
        for name, kind in (("unsafe", unsafe), ("safe", ~unsafe))
    }
