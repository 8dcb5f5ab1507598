"""What a model says: greedy answers to prompts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.alignment import pad_token_id
from ..data.rows import Messages, Row, RowError, check_prompts, is_prompt_only, prompt_ids, row_name
from .forward import context_length, evaluating, input_device, last_logits
from .reasoning import is_reasoning_mark, opened_reasoning


BATCH_SIZE = 32
ANSWER_TOKENS = 64  # of an answer that is to be kept: a refusal is over by then, and what an answer is about is said


def end_tokens(tokenizer: PreTrainedTokenizerBase, *models: PreTrainedModel | PeftModel) -> list[int]:
    """
    Tokens at which an answer ends: those of the tokenizer and of the generation configs of all models. Models that are
    compared share them, so that no answer goes on where the other one's ends.
    """
    ends = {tokenizer.eos_token_id}
    for model in models:
        told = model.generation_config.eos_token_id
        ends |= {told} if isinstance(told, int) else {*(told or ())}
    return sorted(ends - {None})


def greedy_decoding(max_new_tokens: int, end_token_ids: list[int], pad_token_id: int) -> GenerationConfig:
    """Greedy decoding and nothing beside it: no penalty, beam, forced or forbidden token, and no least length."""
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,  # also of a model in training, which switches it off
        eos_token_id=end_token_ids or None,
        pad_token_id=pad_token_id,
    )


@contextmanager
def decoding_by(model: PreTrainedModel | PeftModel, config: GenerationConfig) -> Iterator[None]:
    """
    The model with this generation config alone, and then with its own again. `generate` fills what a given config leaves open
    from the one that the model came with, and PEFT hands its own to the model inside: so both are exchanged.
    """
    holders: list[Any] = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    kept = [vars(holder).get("generation_config") for holder in holders]
    for holder in holders:
        holder.generation_config = config
    try:
        yield
    finally:
        for holder, own in zip(holders, kept, strict=True):
            if own is None:  # looked up in the model inside
                del holder.generation_config
            else:
                holder.generation_config = own


def padded_left(rows: list[list[int]], pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """Token ids and attention mask of rows that end together."""
    length = max(len(row) for row in rows)
    return {
        "input_ids": torch.tensor([[pad_token_id] * (length - len(row)) + row for row in rows], device=device),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device),
    }


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Messages],
    *,
    max_new_tokens: int = 64,
    batch_size: int = BATCH_SIZE,
    end_token_ids: list[int] | None = None,
    desc: str = "Answers",
    progress: bool = True,
    on_batch: Callable[[list[int], list[str]], None] | None = None,
) -> list[str]:
    """
    Greedy answers of a model, in the order of the prompts. Its own generation config has no say but for where answers end.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Model, with or without an adapter; left as it was.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        prompts (`list`):
            Conversations (lists of messages) or plain texts.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest answer; a shorter one where prompt and answer are all that the model reads.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts per batch; prompts of similar length go together, padded on the left.
        end_token_ids (`list[int]`, *optional*):
            Tokens at which an answer ends; by default the [`end_tokens`] of this model.
        desc (`str`, *optional*, defaults to `"Answers"`):
            Text of the progress bar.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show it.
        on_batch (`Callable`, *optional*):
            Called after every batch with positions and answers.

    Raises:
        [`RowError`]: If a prompt can't be read, or fills all that the model reads; told before any is answered.
    """
    check_prompts(tokenizer, prompts, context_length(model))
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    answers = [""] * len(prompts)
    ends = end_tokens(tokenizer, model) if end_token_ids is None else end_token_ids
    pad, decode = pad_token_id(tokenizer), answer_decoder(tokenizer)
    with evaluating(model), tqdm(total=len(prompts), desc=desc, unit="prompt", disable=not progress) as bar:
        for chunk, written in _generate(model, encoded, max_new_tokens, batch_size, ends, pad):
            for i, text in zip(chunk, decode([_open(ids, ends) for ids in written]), strict=True):
                answers[i] = text.strip()
            if on_batch is not None:
                on_batch(chunk, [answers[i] for i in chunk])
            bar.update(len(chunk))
    return answers


def _generate(
    model: PreTrainedModel | PeftModel,
    encoded: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    ends: list[int],
    pad: int,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Greedy answers as tokens, batch by batch, with the positions of their prompts; the end, where there is one, is the last."""
    device, options = input_device(model), last_logits(model)
    for chunk, room in _chunks(encoded, max_new_tokens, batch_size, context_length(model)):
        padded = padded_left([encoded[i] for i in chunk], pad, device)
        with torch.no_grad(), decoding_by(model, config := greedy_decoding(room, ends, pad)):
            generated = model.generate(**padded, generation_config=config, **options)
        # Cut at the end here: the padding behind it may be a word of the vocabulary.
        yield chunk, [_through(ids, ends) for ids in generated[:, padded["input_ids"].shape[1] :].tolist()]


def _chunks(
    encoded: list[list[int]], longest: int, batch_size: int, context: int | None
) -> Iterator[tuple[list[int], int]]:
    """
    Positions of prompts of similar length, and room for their answers. Prompts that leave less room than asked for go alone, so
    that no neighbour in a batch takes room from another.
    """
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    rooms = [longest if context is None else min(longest, context - len(encoded[i])) for i in order]
    fits = order[: rooms.count(longest)]
    for start in range(0, len(fits), batch_size):
        yield fits[start : start + batch_size], longest
    yield from (([i], room) for i, room in zip(order, rooms, strict=True) if room < longest)


def answer_decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[list[int]]], list[str]]:
    """What makes texts of answers, without special tokens but for the marks of reasoning, which some tokenizers count among them."""
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(index for index, token in added if token.special)}
    marks = {index for index, token in added if index in special and is_reasoning_mark(token.content)}
    if not marks:
        return partial(tokenizer.batch_decode, skip_special_tokens=True)
    hidden = special - marks
    return lambda rows: tokenizer.batch_decode([[token for token in row if token not in hidden] for row in rows])


def opened_by_template(tokenizer: PreTrainedTokenizerBase, prompt: Messages) -> str:
    """The mark of reasoning that a chat template opens at the end of a prompt, so that the answer begins inside; else empty."""
    return opened_reasoning(tokenizer.decode(prompt_ids(tokenizer, prompt)[-16:]))


def _through(ids: list[int], ends: list[int]) -> list[int]:
    """Tokens up to the end, and the end."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))]


def _open(ids: list[int], ends: list[int]) -> list[int]:
    """Tokens without the end."""
    return ids[:-1] if ids and ids[-1] in ends else ids


def answered_by(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    progress: bool = True,
    *,
    max_length: int | None = None,
) -> list[Row]:
    """
    Rows as they are, those with a prompt alone with the greedy answer (at most 64 tokens) of the model as it is now: as text, and
    with the very tokens that it wrote, which a chat template may render otherwise.

    Raises:
        `ValueError`: If a prompt can't be read, fills all that the model reads, or leaves no room for an answer within
            `max_length` tokens; told before any is answered.
    """
    numbered = [Row(row, number) for number, row in enumerate(rows)]
    places = [place for place, row in enumerate(numbered) if is_prompt_only(row)]
    asked = [numbered[place] for place in places]
    check_prompts(tokenizer, list(asked), context_length(model))
    encoded = [prompt_ids(tokenizer, row) for row in asked]
    for row, ids in zip(asked, encoded, strict=True):
        if max_length is not None and len(ids) >= max_length:
            raise RowError(
                f"{row_name(row)} has a prompt of {len(ids)} tokens, which leaves no room for an answer within {max_length}: raise "
                "`fisher_max_length`, or shorten or remove the row."
            )
    ends, decode = end_tokens(tokenizer, model), answer_decoder(tokenizer)
    options = dict(desc="Reference answers", unit="prompt", disable=not progress)
    with evaluating(model), tqdm(total=len(asked), **options) as bar:
        for chunk, written in _generate(model, encoded, ANSWER_TOKENS, BATCH_SIZE, ends, pad_token_id(tokenizer)):
            for i, ids, text in zip(chunk, written, decode([_open(ids, ends) for ids in written]), strict=True):
                numbered[places[i]] = _answered(asked[i], text.strip(), (encoded[i] + ids, len(encoded[i])))
            bar.update(len(chunk))
    return numbered


def _answered(row: Row, text: str, tokens: tuple[list[int], int]) -> Row:
    answer = text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
    return Row({**row, "completion": answer}, row.number, tokens)
