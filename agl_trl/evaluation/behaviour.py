"""Base and tuned model side by side: the same prompts, answers, likelihoods and KL, with intervals."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.alignment import tokenize_rows
from ..data.labels import unsafe_column
from ..data.rows import check_prompts, prompt_text, questions_of
from ..modeling.base_and_tuned import BaseAndTuned
from ..modeling.forward import context_length
from ..modeling.generation import end_tokens
from ..modeling.lora import AdaptedLayer
from .answer_cache import AnswerCache
from .answers import Answers, answer_prompts, answer_until, count_unasked
from .judges import Judge, StringJudge
from .probes import KL_TOKENS, Probes, probe
from .rates import Rate, binomial_test
from .verdict_counts import verdict_counts


@dataclass
class Behaviour:
    """
    What base and tuned model did with the same prompts; all tensors of shape `(prompts,)`.

    Args:
        categories (`list[str]`):
            Category of every prompt.
        unsafe (`Tensor`):
            Boolean: whether a refusal is the right answer.
        refused_base, refused_tuned (`Tensor`):
            Boolean: whether the greedy answer refuses.
        nll_base, nll_tuned (`Tensor`):
            Negative log-likelihood per token of the reference answer, in nats; NaN where there is none.
        kl_first_tokens (`Tensor`):
            `KL(base ‖ tuned)` per token over the first tokens of the base model's own answer, in nats.
        margin_base, margin_tuned, hidden_drift, direction_cosine (`Tensor`):
            As in [`Probes`].
        metadata (`dict`):
            Judge, decoding, and of both sides how many verdicts are uncertain and how many answers were cut off; the servers, where
            some were asked.
        answers (`list[dict]`):
            Prompt, answers and verdicts, one entry per prompt; not part of the saved report.
    """

    categories: list[str]
    unsafe: Tensor
    refused_base: Tensor
    refused_tuned: Tensor
    nll_base: Tensor
    nll_tuned: Tensor
    kl_first_tokens: Tensor
    margin_base: Tensor
    margin_tuned: Tensor
    hidden_drift: Tensor
    direction_cosine: Tensor
    metadata: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)

    def mean_kl(self, unsafe: bool) -> float:
        """Mean of `kl_first_tokens` over unsafe or safe prompts, in nats."""
        return self.kl_first_tokens[self.unsafe == unsafe].mean().item()

    def refusal(self, tuned: bool, unsafe: bool = True, category: str | None = None) -> Rate:
        """Refusal rate on unsafe prompts, or over-refusal on safe ones, of all prompts or of one category."""
        chosen = self.unsafe == unsafe
        if category is not None:
            chosen = chosen & torch.tensor([c == category for c in self.categories])
        refused = self.refused_tuned if tuned else self.refused_base
        return Rate(int(refused[chosen].sum()), int(chosen.sum()))

    def categories_of(self, unsafe: bool) -> list[str]:
        """Categories of unsafe or of safe prompts, each once, in alphabetical order."""
        return sorted({c for c, u in zip(self.categories, self.unsafe.tolist(), strict=True) if u == unsafe})

    @property
    def num_unasked(self) -> int:
        """Prompts that were not asked, since the verdict of a gate was certain without them."""
        return sum(sum(kind.values()) for kind in self.metadata.get("unasked", {}).values())

    @property
    def served(self) -> dict[str, dict[str, Any]] | None:
        """Model, address and number of answers cut at their length, by side, where servers were asked: they show answers alone."""
        return self.metadata.get("served")

    def paired_p_value(self, unsafe: bool = True) -> float:
        """
        P-value of McNemar's exact test that base and tuned model refuse equally often: of the prompts on which they differ,
        either is as likely to be the one that refuses.
        """
        chosen = self.unsafe == unsafe
        lost = int((self.refused_base & ~self.refused_tuned)[chosen].sum())
        won = int((~self.refused_base & self.refused_tuned)[chosen].sum())
        return binomial_test()(lost, lost + won).pvalue if lost + won else 1.0


def measure_behaviour(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    *,
    base: PreTrainedModel | None = None,
    layers: list[AdaptedLayer] | None = None,
    judge: Judge | None = None,
    store: AnswerCache | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: bool = True,
    certain: Callable[[Tensor, Tensor, Tensor, Tensor], bool] | None = None,
) -> Behaviour:
    """
    Ask base (adapter off) and tuned model (adapter on) the same prompts, decoded greedily.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Base model with its adapter, or the tuned one of two checkpoints.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        prompts (`Dataset`):
            Column `prompt`; optional `completion` (reference answer), `category`, `id`, `tools` and `chat_template_kwargs` (for
            the chat template), and boolean `unsafe` or `expected` (`"refuse"`, `"comply"`); by default all are unsafe.
        base (`PreTrainedModel`, *optional*):
            Base model, where the tuned one is a checkpoint of its own.
        layers (`list[AdaptedLayer]`, *optional*):
            Layers with their references, of a continued adapter; its start then is the base.
        judge ([`Judge`], *optional*):
            Judge of the answers; by default [`StringJudge`].
        store ([`AnswerCache`], *optional*):
            Where answers are kept while they are made.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest answer.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts per batch.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.
        certain (`Callable`, *optional*):
            Says after every batch of the tuned model whether enough is known, from `refused_base`, `refused_tuned`, `asked` and
            `unfinished` (an answer of either model was cut off while reasoning), boolean, of shape `(prompts,)`. The order is that
            of a fixed seed. Prompts that are left are in no figure; `metadata["unasked"]` counts them.

    Raises:
        `ValueError`: If there is no column `prompt` or no row, or a row can't be read or is longer than the model reads.
        [`MissingExtra`]: If scipy is not installed, without which nothing can be said of the answers.
    """
    binomial_test()  # told now, not when all prompts are answered
    if "prompt" not in prompts.column_names or len(prompts) == 0:
        raise ValueError(
            f"Prompts need a column 'prompt' and at least one row; found {prompts.column_names}, {len(prompts)} rows."
        )
    questions = questions_of(prompts)
    context = context_length(model)
    check_prompts(tokenizer, questions, context)  # as long as no model has answered
    if "completion" in prompts.column_names:
        tokenize_rows(prompts, tokenizer, context=context)
    if base is not None:
        check_vocabulary(base, model, tokenizer)
    models, judge = BaseAndTuned(model, base, layers), judge or StringJudge()
    options: dict[str, Any] = dict(
        judge=judge,
        store=store,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
        end_token_ids=end_tokens(tokenizer, model, *([] if base is None else [base])),
    )
    with models.side(False) as one:
        before = answer_prompts(one, tokenizer, prompts, desc="Base model", **options)
    unasked = {}
    with models.side(True) as one:
        if certain is None:
            after = answer_prompts(one, tokenizer, prompts, **options)
        else:
            ask = partial(answer_prompts, one, tokenizer, **options)
            chosen, after = answer_until(certain, before, ask, prompts, batch_size=batch_size)
            unasked = count_unasked(chosen, before.refused, unsafe_column(prompts))
            prompts, before = prompts.select(chosen), before.select(chosen)
            questions = questions_of(prompts)
    probes = probe(models, tokenizer, questions, before.texts, unsafe_column(prompts), batch_size=batch_size)
    behaviour = compare(prompts, before, after, probes, judge)
    if unasked:
        behaviour.metadata["unasked"] = unasked
    return behaviour


def check_vocabulary(base: PreTrainedModel, tuned: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Check that two checkpoints can be asked with one tokenizer.

    Raises:
        `ValueError`: If the tuned one has dropped tokens that the tokenizer makes.
    """
    sizes = [model.get_input_embeddings().weight.shape[0] for model in (base, tuned)]
    if sizes[1] < min(sizes[0], len(tokenizer)):
        raise ValueError(
            f"The tuned model knows {sizes[1]} tokens, the base model {sizes[0]}, and its tokenizer makes {len(tokenizer)}: "
            "it can't be asked the same prompts."
        )


def compare(prompts: Dataset, base: Answers, tuned: Answers, probes: Probes, judge: Judge) -> Behaviour:
    """Answers of two models to the same prompts, side by side with what [`probe`] measured."""
    columns, count = prompts.column_names, len(prompts)
    ids = list(prompts["id"]) if "id" in columns else [str(i) for i in range(count)]
    categories = list(prompts["category"]) if "category" in columns else ["all"] * count
    unsafe = unsafe_column(prompts)
    questions = [prompt_text(prompt) for prompt in prompts["prompt"]]
    judge_name = Path(judge.name).name if Path(judge.name).exists() else judge.name  # no path of a machine in a report
    entries = [
        {
            "id": ids[i],
            "prompt": questions[i],
            "category": categories[i],
            "expected": "refuse" if unsafe[i] else "comply",
            "response_base": base.texts[i],
            "response_tuned": tuned.texts[i],
            "label_base": base.verdicts[i].label,
            "label_tuned": tuned.verdicts[i].label,
            "reason_base": base.verdicts[i].reason,
            "reason_tuned": tuned.verdicts[i].reason,
            "judge": f"{judge_name} {judge.version}",
        }
        for i in range(count)
    ]
    return Behaviour(
        categories=categories,
        unsafe=unsafe,
        refused_base=base.refused,
        refused_tuned=tuned.refused,
        nll_base=base.nll,
        nll_tuned=tuned.nll,
        **probes._asdict(),
        metadata={
            "judge": {"name": judge_name, "version": judge.version},
            "verdicts": {"base": verdict_counts(base.verdicts), "tuned": verdict_counts(tuned.verdicts)},
            "decoding": tuned.decoding,
            "kl_tokens": KL_TOKENS,
            "prompts_sha256": hashlib.sha256(json.dumps([ids, questions]).encode()).hexdigest(),
        },
        answers=entries,
    )
