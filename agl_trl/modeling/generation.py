"""What a model says: greedy answers to prompts, and the likelihood of reference answers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ..data.alignment import AlignmentBatch, batches, pad_token_id, tokenize_rows
from ..data.rows import Messages, Row, check_prompts, is_prompt_only, prompt_ids
from .lora import packs_in_eval_mode
from .reasoning import is_reasoning_mark


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """
    Eval mode (no dropout, and no checkpointing, which would fire some hooks twice), then every module as it was.

    At the first inference on some CPUs bitsandbytes packs 4-bit weights into a form that passes no gradient on: a training
    that goes on afterwards would silently lose most of its gradient. Not here.
    """
    modes = [(module, module.training) for module in model.modules()]
    packing: list[Any] = [module for module in model.modules() if packs_in_eval_mode(module)]
    model.eval()
    for module in packing:
        module.support_avx512bf16_for_cpu = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module in packing:
            module.support_avx512bf16_for_cpu = True


def input_device(model: nn.Module) -> torch.device:
    """Where the inputs of a model go; one whose weights are offloaded (and here are empty) moves them itself."""
    device = next(model.parameters()).device
    return PartialState().device if device.type == "meta" else device


def context_length(model: PreTrainedModel | PeftModel) -> int | None:
    """Most tokens that a model reads at once; none where its configuration knows no bound."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def answer_logits(model: PreTrainedModel | PeftModel, batch: AlignmentBatch) -> tuple[Tensor, Tensor]:
    """
    Logits of the columns in which any row of a batch has answer tokens, of shape `(batch, columns, vocabulary)`, and which of
    them are that row's, boolean, of shape `(batch, columns)`. With large vocabularies those of all columns are gigabytes.
    """
    columns = batch.answer_mask.any(0).nonzero().squeeze(1)
    return forward_at(model, batch, columns).logits, batch.answer_mask[:, columns]


def forward_at(
    model: PreTrainedModel | PeftModel, batch: AlignmentBatch, columns: Tensor, **options: Any
) -> ModelOutput:
    """
    Output of a model for a batch, whose `logits` are those of some columns alone, of shape `(batch, columns, vocabulary)`.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Model; the batch goes to where its inputs go.
        batch ([`AlignmentBatch`]):
            Rows.
        columns (`Tensor`):
            Positions, of shape `(columns,)`.
        options:
            Further arguments of the forward pass, such as `output_hidden_states=True`.
    """
    device = input_device(model)
    fewer = {"logits_to_keep": columns.to(device)} if takes_logits_to_keep(model) else {}
    inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}
    output = model(**inputs, use_cache=False, **fewer, **options)
    if not fewer:
        output.logits = output.logits[:, columns.to(output.logits.device)]
    return output


def takes_logits_to_keep(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the model can be asked for the logits of a few columns."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in signature(base.forward).parameters


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Messages],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    desc: str = "Answers",
    progress: bool = True,
    on_batch: Callable[[list[int], list[str]], None] | None = None,
) -> list[str]:
    """
    Greedy answers of a model, in the order of the prompts.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Model, with or without an adapter; left as it was.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        prompts (`list`):
            Conversations (lists of messages) or plain texts.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest answer.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts per batch; prompts of similar length go together, padded on the left.
        desc (`str`, *optional*, defaults to `"Answers"`):
            Text of the progress bar.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show it.
        on_batch (`Callable`, *optional*):
            Called after every batch with positions and answers.
    """
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    answers = [""] * len(prompts)
    with evaluating(model), tqdm(total=len(prompts), desc=desc, unit="prompt", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            padded = tokenizer.pad(
                {"input_ids": [encoded[i] for i in chunk]}, padding_side="left", return_tensors="pt"
            )
            generated = model.generate(
                **padded.to(input_device(model)), max_new_tokens=max_new_tokens, do_sample=False, use_cache=True
            )
            texts = decode_answers(tokenizer, generated[:, padded["input_ids"].shape[1] :].tolist())
            for i, text in zip(chunk, texts, strict=True):
                answers[i] = text.strip()
            if on_batch is not None:
                on_batch(chunk, [answers[i] for i in chunk])
            bar.update(len(chunk))
    return answers


def decode_answers(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str]:
    """Texts of answers without special tokens, but for the marks of reasoning, which some tokenizers count among them."""
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(index for index, token in added if token.special)}
    marks = {index for index, token in added if index in special and is_reasoning_mark(token.content)}
    if not marks:
        return tokenizer.batch_decode(rows, skip_special_tokens=True)
    hidden = special - marks
    return tokenizer.batch_decode([[token for token in row if token not in hidden] for row in rows])


@torch.no_grad()
def answer_nll(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | list[dict[str, Any]],
    *,
    batch_size: int = 32,
    max_length: int | None = 1024,
) -> Tensor:
    """
    Mean negative log-likelihood per token of the reference answer of every row, in nats, of shape `(rows,)`.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Model, with or without an adapter; left as it was.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        dataset (`Dataset` or `list[dict]`):
            Rows in prompt-completion format.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows per forward pass.
        max_length (`int`, *optional*, defaults to `1024`):
            Longer rows lose their end.
    """
    rows = tokenize_rows(dataset, tokenizer, max_length, context_length(model))
    nll = torch.zeros(len(rows))
    with evaluating(model):
        for batch in batches(rows, batch_size, pad_token_id(tokenizer), input_device(model)):
            logits, mask = answer_logits(model, batch)
            for line, index in enumerate(
                batch.indices
            ):  # one by one: a whole batch of vocabularies in float32 is large
                answer = batch.input_ids[line, 1:][batch.answer_mask[line, :-1]]
                nll[index] = cross_entropy(logits[line, mask[line]].float(), answer).cpu()
    return nll


def answered_by(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    progress: bool = True,
) -> list[Row]:
    """
    Rows as they are, those with a prompt alone with the greedy answer (at most 256 tokens) of the model as it is now.

    Raises:
        `ValueError`: If a prompt can't be read, or fills all that the model reads; told before any is answered.
    """
    numbered = [Row(row, number) for number, row in enumerate(rows)]
    asked = [row for row in numbered if is_prompt_only(row)]
    check_prompts(tokenizer, asked, context_length(model))
    answers = iter(
        generate_answers(
            model, tokenizer, list(asked), max_new_tokens=256, desc="Reference answers", progress=progress
        )
    )
    return [_answered(row, next(answers)) if is_prompt_only(row) else row for row in numbered]


def _answered(row: Row, text: str) -> Row:
    answer = text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
    return Row({**row, "completion": answer}, row.number)
