"""The models that costs are measured on, and rows that fill their sequences."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from agl_trl.experiments.demo import LORA, TRAINING
from agl_trl.miniworld import load_model, load_tokenizer, preference_dataset, task_dataset


@dataclass(frozen=True)
class Shape:
    """
    One size of model and step.

    Args:
        config (`dict`, *optional*):
            Llama configuration of a model with random weights; `None` is the embedded model.
        length (`int`):
            Tokens of a row.
        batch (`int`):
            Rows of a step.
        rank (`int`):
            Rank of the adapter, on all linear layers.
        accelerator (`bool`):
            Whether it is trained in bfloat16 on an accelerator.
    """

    config: dict[str, Any] | None
    length: int
    batch: int
    rank: int
    accelerator: bool = False


def _llama_config(vocabulary: int, width: int, inner: int, layers: int, heads: tuple[int, int], tied: bool) -> dict:
    sizes = dict(vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers)
    return sizes | dict(num_attention_heads=heads[0], num_key_value_heads=heads[1], tie_word_embeddings=tied)


SHAPES = {
    "embedded": Shape(None, 48, 16, 8),
    "135m": Shape(_llama_config(49152, 576, 1536, 30, (9, 3), tied=True), 512, 4, 16),
    "1b": Shape(_llama_config(128256, 2048, 8192, 16, (32, 8), tied=True), 2048, 2, 16, accelerator=True),
    "8b": Shape(_llama_config(128256, 4096, 14336, 32, (32, 8), tied=False), 2048, 2, 16, accelerator=True),
}


def llama(**config: Any) -> LlamaForCausalLM:
    """A Llama with random weights of seed 0."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config))


def model_of(shape: Shape) -> PreTrainedModel:
    if shape.config is None:
        return load_model()
    if not shape.accelerator:
        return llama(**shape.config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return llama(**shape.config)
    finally:
        torch.set_default_dtype(torch.float32)


def lora_of(shape: Shape) -> dict[str, Any]:
    return LORA | dict(r=shape.rank)


def training_of(shape: Shape) -> dict[str, Any]:
    """Arguments common to all trainers."""
    precision = dict(use_cpu=False, bf16=True, gradient_checkpointing=True) if shape.accelerator else {}
    quiet = dict(logging_steps=1000, warmup_steps=1, save_strategy="no")
    return {**TRAINING, "per_device_train_batch_size": shape.batch, "max_length": shape.length, **quiet, **precision}


def rows_of(shape: Shape, kind: str = "sft", rows: int = 64) -> Dataset:
    """Rows of the embedded world; for the larger shapes joined until each has at least `length` tokens, which training cuts."""
    source = preference_dataset("extract") if kind == "dpo" else task_dataset("extract")
    if shape.config is None:
        return source.select(range(max(rows, shape.batch)))
    prompt, *answers = ("prompt", "chosen", "rejected") if kind == "dpo" else ("prompt", "completion")
    texts = [{name: row[name][-1]["content"] for name in (prompt, *answers)} for row in source.select(range(400))]
    tokenizer, lines = load_tokenizer(), []
    tokens = [max(len(tokenizer(" " + text[name]).input_ids) for name in answers) for text in texts]
    for number in range(rows):
        start, chosen = number * 7 % len(texts), []
        while sum(tokens[i] for i in chosen) < shape.length:
            chosen.append((start + len(chosen)) % len(texts))
        line = {name: " ".join(texts[i][name] for i in chosen) for name in answers}
        lines.append(line | {"prompt": texts[start]["prompt"]} if kind == "dpo" else {"text": line["completion"]})
    return Dataset.from_list(lines)
