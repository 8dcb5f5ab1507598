"""Estimating the Fisher statistics of an aligned model: one pass over alignment rows, hooks on linear layers."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.alignment import (
    AlignmentBatch,
    AlignmentRow,
    batches,
    pad_token_id,
    select_rows,
    tokenize_rows,
)
from ..data.rows import is_prompt_only
from ..modeling.forward import answer_logits, context_length, evaluating, input_device, last_logits
from ..modeling.generation import answered_by
from ..modeling.lora import layer_shape, linear_layers
from ..objective.covariance import LowRankCovariance
from .collector import Collector
from .partial_sums import PartialSums, weights_fingerprint
from .statistics import FisherStatistics, describe_base


FisherType = Literal["projection", "empirical", "mc"]


def estimate_fisher(
    model: PreTrainedModel | PeftModel,
    dataset: Dataset | IterableDataset | Sequence[dict[str, Any]],
    processing_class: PreTrainedTokenizerBase,
    *,
    fisher_type: FisherType = "projection",
    shrinkage: float = 1.0,
    rank: int = 64,
    num_samples: int | None = 256,
    batch_size: int = 8,
    max_length: int | None = 1024,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    progress: bool = True,
    resume_dir: str | PathLike | None = None,
) -> FisherStatistics:
    """
    Estimate the Fisher statistics of a model at its current weights, in K-FAC form.

    For every linear layer, over the attention-masked tokens of the rows that must keep their behaviour (the first token
    of each row left out),

        X = E[x xᵀ]  of the layer's input,    G = E[g gᵀ]  of the gradient at its output,

    kept as leading eigenpairs plus an isotropic remainder. With `shrinkage=1` the metric needs X alone and the pass is
    forward only. The model runs in eval mode and is left as it was; the global random state stays untouched. With
    several processes every one takes its share of the rows and the sums are reduced once.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Reference model. With an adapter the layers it adapts are measured, without one all linear layers but the output
            head and those that do not see every token (a vision tower, fused kernels), which `metadata["skipped_layers"]` names.
        dataset (`Dataset`, `IterableDataset` or `Sequence[dict]`):
            Alignment rows in TRL's prompt-completion, preference, prompt-only or language-modeling format; prompt-only rows
            get their answers from the model. A boolean column `unsafe` selects the rows that carry the statistics.
        processing_class (`PreTrainedTokenizerBase`):
            Tokenizer of the model.
        fisher_type (`str`, *optional*, defaults to `"projection"`):
            What is differentiated for G: `"projection"` (random ±1 projections of the logits at answer positions, which
            does not vanish on a confident model), `"empirical"` (log-likelihood of the given answers) or `"mc"`
            (log-likelihood of sampled tokens: the true Fisher).
        shrinkage (`float`, *optional*, defaults to `1.0`):
            δ in `G_δ = (1 − δ) G / mean_eig(G) + δ I`.
        rank (`int`, *optional*, defaults to `64`):
            Number k of eigenpairs kept per covariance.
        num_samples (`int`, *optional*, defaults to `256`):
            Number of rows; `None` takes all.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows per forward pass. Does not change the result beyond rounding.
        max_length (`int`, *optional*, defaults to `1024`):
            Longer rows lose their end.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the row sample, the sketch and the projections.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            Type of the stored eigenvectors.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
        resume_dir (`str` or `PathLike`, *optional*):
            Folder in which the sums are kept while the pass runs, once a minute: repeated after an interruption, the call goes
            on from there and returns the same numbers (answers to prompt-only rows are made again). For one process.

    Returns:
        [`FisherStatistics`]

    Raises:
        `ValueError`: If there are no rows, their format is unknown, the model has no layer to measure, or an adapted layer
            saw no tokens.
    """
    layers = linear_layers(model)
    if not layers:
        raise ValueError("The model has no linear layer to measure.")
    selected = select_rows(dataset, num_samples, seed)
    if any(map(is_prompt_only, selected)):
        selected = answered_by(model, processing_class, selected, progress, max_length=max_length)
    rows = tokenize_rows(selected, processing_class, max_length, context_length(model))
    sums = None
    if resume_dir is not None:
        if PartialState().num_processes > 1:
            raise ValueError("`resume_dir` is for one process: every process has sums of its own.")
        key = {
            **dict(fisher_type=fisher_type, shrinkage=shrinkage, rank=rank, batch_size=batch_size, seed=seed),
            **dict(rows=_fingerprint(rows), base_model=describe_base(model), layers=sorted(layers)),
            "weights": weights_fingerprint(model),
        }
        sums = PartialSums(Path(resume_dir), key)
    collector = _collect(
        model, layers, rows, processing_class, fisher_type, shrinkage < 1, rank, batch_size, seed, progress, sums
    )
    layers = {name: module for name, module in layers.items() if name in collector.input_of}
    statistics = FisherStatistics(
        inputs={name: _rounded(sketch.covariance(rank), dtype) for name, sketch in collector.inputs.items()},
        outputs={name: _rounded(sketch.covariance(rank), dtype) for name, sketch in collector.outputs.items()},
        input_of={name: collector.input_of[name] for name in layers},
        weight_norm={name: torch.ones(()) for name in layers},
        num_tokens=int(next(iter(collector.inputs.values())).count),
        shrinkage=shrinkage,
        metadata={
            "base_model": describe_base(model),
            "fisher_type": fisher_type if shrinkage < 1 else None,
            "rank": rank,
            "num_rows": len(rows),
            "max_length": max_length,
            "seed": seed,
            "dataset_fingerprint": _fingerprint(rows),
            "shapes": {name: list(layer_shape(module)) for name, module in layers.items()},
            "skipped_layers": sorted(collector.skipped),
            "versions": _versions(),
        },
    )
    statistics.weight_norm = statistics.weight_norms(layers)
    if sums is not None:
        sums.remove()
    return statistics


def _versions() -> dict[str, str]:
    """Versions of what is installed of the libraries that decide the numbers."""
    found = {}
    for name in ("agl-trl", "torch", "transformers", "peft", "trl"):
        with suppress(PackageNotFoundError):  # such as this package itself, where a Space runs it from a folder
            found[name] = version(name)
    return found


def _fingerprint(rows: list[AlignmentRow]) -> str:
    """SHA-256 over the tokens the statistics were taken from: the same for the same rows, wherever they came from."""
    return hashlib.sha256(repr([(row.input_ids, row.answer_start) for row in rows]).encode()).hexdigest()


def _rounded(covariance: LowRankCovariance, dtype: torch.dtype) -> LowRankCovariance:
    # Rounded when estimated and not when saved, so that a resumed run computes with the very same numbers.
    return covariance._replace(eigenvectors=covariance.eigenvectors.to(dtype))


def _collect(
    model, layers, rows, tokenizer, fisher_type, gradients, rank, batch_size, seed, progress, partial_sums=None
) -> "Collector":
    state = PartialState()
    if len(rows) < state.num_processes:
        raise ValueError(
            f"{len(rows)} alignment rows can't be shared by {state.num_processes} processes: give more rows."
        )
    device = input_device(model)
    collector = Collector(layers, rank, gradients, seed, skip_unused=not isinstance(model, PeftModel))
    bar = tqdm(
        total=len(rows), desc="Fisher statistics", unit="row", disable=not (progress and state.is_local_main_process)
    )
    done = 0 if partial_sums is None else collector.restore(*partial_sums.load())
    with bar, evaluating(model), collector:
        for number, batch in enumerate(
            batches(
                rows, batch_size, pad_token_id(tokenizer), device, shard=(state.process_index, state.num_processes)
            )
        ):
            if number < done:
                bar.update(len(batch.indices))
                continue
            run_batch(model, collector, batch, fisher_type, seed)
            bar.update(len(batch.indices) * state.num_processes)
            if partial_sums is not None:
                partial_sums.save(number + 1, collector.input_of, collector.inputs, collector.outputs)
    if state.num_processes > 1:
        collector.sum_over_processes()
    collector.check()
    return collector


def run_batch(
    model: PreTrainedModel | PeftModel, collector: Collector, batch: AlignmentBatch, fisher_type: FisherType, seed: int
) -> None:
    """Add a batch to the sums of a collector."""
    collector.begin(batch.token_mask.flatten())
    if collector.gradients:
        _backward(model, collector, batch, fisher_type, seed)
    else:
        # No logits are read, and with large vocabularies they are most of the memory and a good part of the time; but a head
        # that is measured itself must see every token.
        fewer = {} if measures_head(model, collector) else last_logits(model)
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **fewer)


def measures_head(model: PreTrainedModel | PeftModel, collector: Collector) -> bool:
    """Whether the output head is among the layers that are measured, as where an adapter adapts `lm_head`."""
    head = model.get_output_embeddings()
    return any(module is head for module in collector.layers.values())


def _backward(
    model: PreTrainedModel | PeftModel, collector: Collector, batch: AlignmentBatch, fisher_type: FisherType, seed: int
) -> None:
    """Gradient of the summed objective with respect to every layer's output; no parameter receives a gradient."""
    embedded: list[Tensor] = []

    def leaf(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    embeddings: nn.Module = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            if measures_head(model, collector):
                inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
                logits, mask = model(**inputs, use_cache=False).logits, batch.answer_mask
            else:
                logits, mask = answer_logits(model, batch)
            # Every row draws from its own generator, so that batching and sharding change nothing.
            objective = logits[:, :0].float().sum()  # zero, also of a batch in which no row counts
            for line, index in enumerate(batch.indices):
                positions = batch.answer_mask[line].nonzero().squeeze(1)
                generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
                labels = batch.input_ids[line, positions + 1]
                objective = objective + _objective(logits[line, mask[line]].float(), labels, fisher_type, generator)
        torch.autograd.grad(objective, embedded[0])
    finally:
        handle.remove()


def _objective(logits: Tensor, labels: Tensor, fisher_type: FisherType, generator: torch.Generator) -> Tensor:
    """Scalar whose gradient at a layer's output is g: the logits, of shape `(n, vocabulary)`, are those that
    predict the answer tokens `labels`, of shape `(n,)`."""
    if fisher_type == "projection":
        signs = torch.randint(0, 2, logits.shape, generator=generator).to(logits) * 2 - 1
        return (signs * logits).sum()
    log_probs = logits.log_softmax(-1)
    if fisher_type == "mc":
        uniform = torch.rand(len(logits), 1, generator=generator).to(logits)
        cumulative = log_probs.detach().exp().cumsum(-1)
        labels = torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).squeeze(1).clamp(max=logits.shape[1] - 1)
    return log_probs.gather(1, labels.unsqueeze(1)).sum()
