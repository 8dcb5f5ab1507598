"""What is measured of a model: counts of verdicts, likelihoods and KL. Answers stay in memory, or in the cache."""

import math
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agl_trl.data.alignment import AlignmentBatch, AlignmentRow, batches, pad_token_id
from agl_trl.data.rows import prompt_ids, questions_of
from agl_trl.evaluation.behaviour import Answers, answer_prompts
from agl_trl.evaluation.verdict_counts import verdict_counts
from agl_trl.modeling.forward import answer_logits, evaluating, input_device
from agl_trl.modeling.generation import generate_answers
from agl_trl.modeling.likelihood import answer_nll

from .base import Base
from .setting import DRIFTCAPS, Data, Options


BATCH = 4  # rows per forward pass: of a vocabulary of 150,000, logits of four answers are a third of a gigabyte
WINDOW = 128  # tokens of general text


def row_figures(
    model: PreTrainedModel | PeftModel, batch: AlignmentBatch, *, compare: bool = True
) -> tuple[Tensor, Tensor]:
    """
    NLL of the answer of every row, and KL from the model with its adapter off, both means over the row's answer tokens, in
    nats, of shape `(rows,)`; with a gradient where the model has one. The KL is zero where there is no adapter, or with
    `compare=False`, which saves its pass.
    """
    logits, mask = answer_logits(model, batch)
    reference = logits.detach()
    if compare and isinstance(model, PeftModel):
        with torch.no_grad(), model.disable_adapter():
            reference, _ = answer_logits(model, batch)
    nll, kl = [], []
    for line in range(len(batch.indices)):
        p, q = (side[line, mask[line]].float().log_softmax(-1) for side in (reference, logits))
        answer = batch.input_ids[line, 1:][batch.answer_mask[line, :-1]]
        nll.append(-q.gather(1, answer[:, None]).mean())
        kl.append((p.exp() * (p - q)).sum(-1).mean())
    return torch.stack(nll), torch.stack(kl)


@torch.no_grad()
def likelihoods(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[AlignmentRow],
    *,
    compare: bool = True,
) -> tuple[float, float]:
    """Means over rows of [`row_figures`]; NaN where there is no row."""
    nll, kl = torch.full((len(rows),), torch.nan), torch.full((len(rows),), torch.nan)
    with evaluating(model):
        for batch in batches(rows, BATCH, pad_token_id(tokenizer), input_device(model)):
            figures = row_figures(model, batch, compare=compare)
            nll[batch.indices], kl[batch.indices] = (values.cpu() for values in figures)
    return nll.mean().item(), kl.mean().item()


def measure(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, data: Data, base: Base, options: Options
) -> tuple[dict[str, Any], dict[str, str]]:
    """
    Figures of a model, tuned or the base model itself.

    Returns:
        `tuple[dict, dict]`: what goes into the results, and for paired tests of two runs a verdict on every prompt by set, as
        a text of 1 (refused) and 0.
    """
    prompts, verdicts = {}, {}
    for name, rows in data.sets.items():
        answers = (
            base.answers[name]
            if not isinstance(model, PeftModel)
            else answer_prompts(model, tokenizer, rows, max_new_tokens=options.max_new_tokens, progress=False)
        )
        prompts[name] = counts(answers, base.answers[name], torch.tensor(rows["unsafe"]))
        verdicts[name] = "".join("01"[refused] for refused in answers.refused.tolist())
    refusals, lookalikes = own_answers(tokenizer, data.sets[DRIFTCAPS], base.answers[DRIFTCAPS])
    refusals_nll, kl_refusals = likelihoods(model, tokenizer, refusals)
    _, kl_lookalikes = likelihoods(model, tokenizer, lookalikes)
    questions = list(data.heldout["prompt"])
    expected = [completion[-1]["content"] for completion in data.heldout["completion"]]
    longest = max(len(ids) for ids in tokenizer(expected, add_special_tokens=False)["input_ids"])
    # One more than it takes: an answer that was cut can't be the expected one.
    written = generate_answers(model, tokenizer, questions, max_new_tokens=longest + 1, progress=False)
    task_nll = answer_nll(model, tokenizer, data.heldout, batch_size=BATCH).mean().item()
    text = windows(tokenizer, data.text, options.eval_rows) if data.text else []
    figures = {
        "refusals_nll": refusals_nll,
        "kl_refusals": kl_refusals,
        "kl_lookalikes": kl_lookalikes,
        "task_nll": task_nll,
        "task_exact": sum(same(a, b) for a, b in zip(written, expected, strict=True)) / len(expected),
        "text_nll": likelihoods(model, tokenizer, text, compare=False)[0],
    }
    return {"prompts": prompts} | {name: finite(value) for name, value in figures.items()}, verdicts


def counts(answers: Answers, base: Answers, unsafe: Tensor) -> dict[str, dict[str, int]]:
    """Of unsafe and of safe prompts: how many there are, are refused, were by the base model, and by both."""
    refused, before = answers.refused, base.refused
    result = {}
    for label, chosen in (("unsafe", unsafe), ("safe", ~unsafe)):
        if not chosen.any():
            continue
        own = [verdict for verdict, taken in zip(answers.verdicts, chosen.tolist(), strict=True) if taken]
        result[label] = {
            "prompts": int(chosen.sum()),
            "refused": int((refused & chosen).sum()),
            "base_refused": int((before & chosen).sum()),
            "kept": int((refused & before & chosen).sum()),
            "garbled": sum(verdict.label == "garbled" for verdict in own),
        } | verdict_counts(own)
    return result


def own_answers(
    tokenizer: PreTrainedTokenizerBase, prompts: Dataset, answers: Answers
) -> tuple[list[AlignmentRow], list[AlignmentRow]]:
    """
    The base model's answers as rows: refusals of unsafe prompts, and answers to safe ones that it did not refuse. Without an
    end, as many were cut.
    """
    kinds: tuple[list[AlignmentRow], list[AlignmentRow]] = ([], [])
    refused = answers.refused.tolist()
    for number, question in enumerate(questions_of(prompts)):
        unsafe = prompts[number]["unsafe"]
        ids = tokenizer(answers.texts[number], add_special_tokens=False)["input_ids"]
        if ids and refused[number] is unsafe:
            start = prompt_ids(tokenizer, question)
            kinds[not unsafe].append(AlignmentRow(start + ids, len(start)))
    return kinds


def windows(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> list[AlignmentRow]:
    """The first windows of a text, one after the other."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: count * WINDOW]
    parts = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    return [AlignmentRow(part, 1) for part in parts if len(part) > 1]


def same(written: str, expected: str) -> bool:
    """Whether two short answers are the same but for case, outer spaces and a full stop."""
    return written.strip().rstrip(".").casefold() == expected.strip().rstrip(".").casefold()


def finite(value: float) -> float | None:
    """`None` for what JSON can't hold: of no rows, or of a run that has diverged."""
    return value if math.isfinite(value) else None
