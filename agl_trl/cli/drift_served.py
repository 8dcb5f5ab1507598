"""What `agl-trl drift --base-url` does: the same report from answers of servers, without weights."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
import typer

from ..drift.gate import certain_already
from ..drift.report import DriftReport
from ..evaluation.answer_cache import AnswerCache
from ..evaluation.engine import EngineError, ServedModel
from ..evaluation.judges import load_judge
from ..evaluation.served import measure_served
from .drift_asked import check_files, described, load_asked, rules_of
from .drift_written import write_drift


WITHOUT_WEIGHTS = "the models were asked through a server, which does not show its weights"


def drift_served(
    *,
    base_url: str | None,
    tuned_url: str | None,
    base_model_id: str | None,
    tuned_model_id: str | None,
    of_weights: Mapping[str, str | None],
    output_dir: Path,
    prompts: str | None,
    limit: int | None,
    judge: str,
    fail_if: Sequence[str],
    sequential: bool,
    html: Path | None,
    with_answers: bool,
    junit: Path | None,
    max_new_tokens: int,
    batch_size: int,
) -> None:
    """
    Ask two served models, write what [`drift`] writes without figures of weights and logits, judge it by the conditions.

    Args:
        base_url, tuned_url (`str`, *optional*):
            Servers; that of the tuned model is by default the same.
        base_model_id, tuned_model_id (`str`, *optional*):
            Names of the models there; by default the only one.
        of_weights (`Mapping[str, str | None]`):
            Options that take the weights, none of which may be set.
        output_dir, prompts, limit, judge, fail_if, sequential, html, with_answers, junit, max_new_tokens, batch_size:
            As in [`drift`].

    Raises:
        `ValueError`: For arguments that contradict each other or don't load.
        `OSError`: If a server does not answer, or a folder can't be written.
        `typer.Exit`: With the exit code of a verdict that is not *pass*.
    """
    if base_url is None:
        raise ValueError("Name the server of the base model as `--base-url`.")
    for option, value in of_weights.items():
        if value is not None:
            raise ValueError(
                f"`{option}` takes the weights, which a server does not show: leave out either it or the servers."
            )
    if prompts is None:
        raise ValueError("A server can only be asked: name prompts as `--prompts`.")
    conditions = rules_of(
        fail_if, sequential=sequential, prompts=prompts, html=html, with_answers=with_answers, junit=junit
    )
    check_files(output_dir, html, junit)
    questions, unsafe, _, conditions = load_asked(prompts, limit, conditions, served=True)
    assert questions is not None and unsafe is not None, "prompts were named"
    with (
        closing(ServedModel(base_url, base_model_id, side="base")) as base,
        closing(ServedModel(tuned_url or base_url, tuned_model_id, side="tuned")) as tuned,
    ):
        if (base.url, base.model_id) == (tuned.url, tuned.model_id):
            raise EngineError(
                f"Base and tuned model are both '{base.name}' at {base.url}: name another as `--tuned-url` or `--tuned-model-id`."
            )
        asked = load_judge(judge, batch_size)
        none = torch.empty(0)
        measured = DriftReport([], none, none, none, none, metadata={"without_weights": WITHOUT_WEIGHTS})
        settings = json.dumps([base.url, base.model_id, tuned.url, tuned.model_id, max_new_tokens])
        unfinished = output_dir / f"unfinished-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.jsonl"
        if unfinished.exists():
            typer.echo(
                f"Answers of an interrupted run are used. If a server has another model since, delete '{unfinished}'."
            )
        measured.behaviour = measure_served(
            base,
            tuned,
            questions,
            judge=asked,
            store=AnswerCache(unfinished, settings),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            certain=partial(certain_already, measured, conditions, unsafe) if sequential else None,
        )
    measured.behaviour.metadata["prompts"] = described(prompts, questions)
    write_drift(
        measured,
        conditions,
        output_dir=output_dir,
        unfinished=unfinished,
        base=base.name,
        tuned=tuned.name,
        options=dict(
            base_url=base.url,
            tuned_url=tuned.url,
            base_model_id=base.name,
            tuned_model_id=tuned.name,
            prompts=prompts,
            limit=limit,
            judge=judge,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            fail_if=conditions,
            sequential=sequential,
        ),
        html=html,
        with_answers=with_answers,
        junit=junit,
    )
