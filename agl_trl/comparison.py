"""Base and tuned model side by side: the same prompts, answers, likelihoods and KL, with intervals."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from scipy.stats import binomtest
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .behaviour import Messages, answer_nll, evaluating, generate_answers, prompt_ids, prompt_text
from .data import AlignmentRow, batches, pad_token_id
from .lora import GuardedLayer, at_reference, guarded_layers
from .refusal import judge


KL_TOKENS = 8


@dataclass(frozen=True)
class Rate:
    """Share of `count` out of `total` with its Wilson 95 % interval."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        interval = binomtest(self.count, self.total).proportion_ci(method="wilson")
        return interval.low, interval.high


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
        metadata (`dict`):
            Judge and decoding.
    """

    categories: list[str]
    unsafe: Tensor
    refused_base: Tensor
    refused_tuned: Tensor
    nll_base: Tensor
    nll_tuned: Tensor
    kl_first_tokens: Tensor
    metadata: dict[str, Any] = field(default_factory=dict)

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


def measure_behaviour(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    *,
    layers: list[GuardedLayer] | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: bool = True,
) -> Behaviour:
    """
    Ask base (adapter off) and tuned model (adapter on) the same prompts, decoded greedily.

    Args:
        model (`PeftModel`):
            Base model with its adapter.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        prompts (`Dataset`):
            Column `prompt`; optional `completion` (reference answer), `category` and boolean `unsafe` (default: all are).
        layers (`list[GuardedLayer]`, *optional*):
            Layers with their references, of a continued adapter; its start then is the base.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest answer.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts per batch.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Raises:
        `ValueError`: If there is no column `prompt` or no row.
    """
    if "prompt" not in prompts.column_names or len(prompts) == 0:
        raise ValueError(
            f"Prompts need a column 'prompt' and at least one row; found {prompts.column_names}, {len(prompts)} rows."
        )
    base, tuned = (
        ask(
            model,
            tokenizer,
            prompts,
            adapter=adapter,
            layers=layers,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            desc=desc,
            progress=progress,
        )
        for adapter, desc in ((False, "Base model"), (True, "Tuned model"))
    )
    kl = first_token_kl(model, tokenizer, list(prompts["prompt"]), base.texts, layers=layers, batch_size=batch_size)
    return compare(prompts, base, tuned, kl)


class Answers(NamedTuple):
    """
    What one model did with the prompts.

    Args:
        texts (`list[str]`):
            Greedy answers.
        refused (`Tensor`):
            Boolean, of shape `(prompts,)`.
        nll (`Tensor`):
            Negative log-likelihood per token of the reference answers, of shape `(prompts,)`, NaN where there is none.
    """

    texts: list[str]
    refused: Tensor
    nll: Tensor


def ask(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    *,
    adapter: bool = True,
    layers: list[GuardedLayer] | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    desc: str = "Tuned model",
    progress: bool = True,
) -> Answers:
    """Answers of one model, with its adapter on or off; arguments as in [`measure_behaviour`]."""
    questions = list(prompts["prompt"])
    with nullcontext() if adapter else at_reference(model, layers or guarded_layers(model)):
        texts = generate_answers(
            model,
            tokenizer,
            questions,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            desc=desc,
            progress=progress,
        )
        if "completion" in prompts.column_names:
            nll = answer_nll(model, tokenizer, prompts, batch_size=batch_size)
        else:
            nll = torch.full((len(prompts),), torch.nan)
    labels = [judge(prompt_text(question), text).label for question, text in zip(questions, texts, strict=True)]
    return Answers(texts, torch.tensor([label == "refusal" for label in labels]), nll)


@torch.no_grad()
def first_token_kl(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Messages],
    answers: list[str],
    *,
    layers: list[GuardedLayer] | None = None,
    batch_size: int = 32,
) -> Tensor:
    """
    `KL(base ‖ tuned)` per token, over the first `KL_TOKENS` tokens of the base model's answer to every prompt, where
    alignment is concentrated.

    Args:
        model (`PeftModel`):
            Base model with its adapter; asked with the adapter off and on.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        prompts (`list`):
            Conversations or plain texts.
        answers (`list[str]`):
            Greedy answers of the base model.
        layers (`list[GuardedLayer]`, *optional*):
            Layers with their references, of a continued adapter; its start then is the base.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts per forward pass.

    Returns:
        `Tensor`: in nats, of shape `(prompts,)`.
    """
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        question = prompt_ids(tokenizer, prompt)
        answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"][:KL_TOKENS]
        rows.append(AlignmentRow(question + (answer_ids or [tokenizer.eos_token_id]), len(question)))
    kl = torch.zeros(len(rows))
    with evaluating(model):
        for batch in batches(rows, batch_size, pad_token_id(tokenizer), model.device):
            inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            with at_reference(model, layers or guarded_layers(model)):
                base = model(**inputs).logits[batch.answer_mask].float().log_softmax(-1)
            tuned = model(**inputs).logits[batch.answer_mask].float().log_softmax(-1)
            per_token = (base.exp() * (base - tuned)).sum(-1).cpu()
            counts = batch.answer_mask.sum(1).tolist()
            kl[batch.indices] = torch.stack([part.mean() for part in per_token.split(counts)])
    return kl


def compare(prompts: Dataset, base: Answers, tuned: Answers, kl: Tensor) -> Behaviour:
    """Answers of two models to the same prompts, and the KL of [`first_token_kl`], side by side."""
    columns, count = prompts.column_names, len(prompts)
    return Behaviour(
        categories=list(prompts["category"]) if "category" in columns else ["all"] * count,
        unsafe=torch.tensor(prompts["unsafe"]) if "unsafe" in columns else torch.ones(count, dtype=torch.bool),
        refused_base=base.refused,
        refused_tuned=tuned.refused,
        nll_base=base.nll,
        nll_tuned=tuned.nll,
        kl_first_tokens=kl,
        metadata={"judge": "refusal-openers", "decoding": "greedy", "kl_tokens": KL_TOKENS},
    )
