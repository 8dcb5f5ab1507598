"""What `agl-trl screen` does."""

import json
from io import BytesIO
from math import isclose
from pathlib import Path

import torch
import typer
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..artifacts.files import REFERENCE_ANSWERS_FILE, ArtifactError, check_file, write_atomically
from ..artifacts.location import find_artifact
from ..data.alignment import AlignmentRow, driftcaps_requests, select_rows, tokenize_rows
from ..data.files import load_rows
from ..data.rows import Row, RowError, is_prompt_only
from ..fisher.protected_rows import COMPLY, NUM_REFERENCE_ANSWERS, REFUSE
from ..fisher.reference_answers import ReferenceAnswers
from ..modeling.forward import context_length
from ..modeling.generation import answered_by
from ..modeling.loading import load_model
from ..screening.requests import is_text_alone, with_request
from ..screening.screen import learn_directions, screen_rows


SHOWN = 5  # rows that are named


def screen(
    *,
    model: str,
    dataset: str,
    split: str,
    config: str | None,
    protected: str | None,
    fisher: str | None,
    scores: Path | None,
    output: Path | None,
    drop: float | None,
    batch_size: int,
    max_length: int,
    seed: int,
    dtype: str | None,
    device_map: str | None,
    bits: int | None,
) -> None:
    """
    Rank the rows of a training set by how much they point against the protected behaviour, and write scores and a copy without
    those ranked first.

    Args:
        model (`str`):
            Folder or Hub id of the model that is to be trained, or `"miniworld"`.
        dataset, split, config:
            Training rows, as [`load_rows`] takes them.
        protected (`str`, *optional*):
            Rows to refuse and look-alikes to answer, marked by a column `unsafe`; by default the model's own answers to DriftCaps.
        fisher (`str`, *optional*):
            Folder or Hub id of published statistics, whose reference answers stand for them.
        scores (`Path`, *optional*):
            JSONL file for the score of every row.
        output (`Path`, *optional*):
            JSONL file for the rows that are left.
        drop (`float`, *optional*):
            How many rows to leave out: a share below 1, or a whole number.
        batch_size, max_length:
            As in [`screen_rows`].
        seed (`int`):
            Seed of the sample of protected rows.
        dtype, device_map, bits:
            As in [`load_model`].

    Raises:
        `ValueError`: If the options contradict each other, or model or rows can't be read.
        `OSError`: If a file can't be written.
    """
    if protected is not None and fisher is not None:
        raise ValueError("`--protected` and `--fisher` both say which rows are protected: give one.")
    if (output is None) != (drop is None):
        raise ValueError("`--output` gets the rows that `--drop` leaves: give both, or neither.")
    if drop is not None and not (0 < drop < 1 or (drop >= 1 and isclose(drop, round(drop)))):
        raise ValueError(f"`--drop` must be a share below 1 or a whole number of rows, got {drop:g}.")
    for path in (scores, output):
        if path is not None:
            check_file(path)
    rows = load_rows(dataset, split, config)
    count = 0 if drop is None else round(drop * len(rows)) if drop < 1 else round(drop)
    if count >= len(rows):
        raise ValueError(f"`--drop {drop:g}` leaves none of the {len(rows)} rows of '{dataset}'.")
    loaded, tokenizer = load_model(model, dtype=dtype, device_map=device_map, bits=bits)
    refused, answered = protected_rows(loaded, tokenizer, protected, fisher, max_length=max_length, seed=seed)
    directions = learn_directions(loaded, tokenizer, refused, answered, batch_size=batch_size)
    try:
        found = screen_rows(
            loaded,
            tokenizer,
            rows,
            directions,
            batch_size=batch_size,
            max_length=max_length,
            total=len(rows),
        )
    except RowError as error:
        raise ValueError(f"Can't screen '{dataset}': {error}") from error
    ranked = found.ranked()
    above = int((found.score > 0).sum())
    typer.echo(f"{len(rows)} rows; {above} ask for what is to be refused and are not refusals (score above 0)")
    typer.echo("ranked first: " + ", ".join(f"row {i} ({found.score[i]:.2f})" for i in ranked[:SHOWN]))
    levels = found.score.double().quantile(torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)).tolist()
    typer.echo("half of all rows score at most {:.2f}, 90 % {:.2f}, 99 % {:.2f}".format(*levels))
    if alone := sum(is_text_alone(Row(row, number)) for number, row in enumerate(rows)):
        typer.echo(
            f"Note: {alone} rows are text alone, without a request, so that their scores say little: write them as 'prompt' and "
            "'completion', or as 'messages' that end with the assistant."
        )
    if scores is not None:
        lines = [
            {"row": i, "score": score, "request": request, "answer": answer}
            for i, (score, request, answer) in enumerate(zip(*(part.tolist() for part in found), strict=True))
        ]
        write_atomically(scores, "".join(json.dumps(line) + "\n" for line in lines).encode())
        typer.echo(f"scores of all rows in {scores}")
    if output is not None:
        content = BytesIO()
        rows.select(sorted(ranked[count:])).to_json(content, lines=True, force_ascii=False)
        write_atomically(output, content.getvalue())
        typer.echo(f"{len(rows) - count} rows without the {count} ranked first in {output}")
        if count != above:
            typer.echo(f"Note: {above} rows score above 0, and {count} were left out.")


def protected_rows(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    protected: str | None,
    fisher: str | None,
    *,
    max_length: int,
    seed: int,
) -> tuple[list[AlignmentRow], list[AlignmentRow]]:
    """
    Rows to refuse and rows to answer, tokenized; those without an answer with the model's own.

    Raises:
        `ValueError`: If they can't be read.
        [`ArtifactError`]: If there are no reference answers, or they are of another model.
    """
    if fisher is not None:
        references = ReferenceAnswers.from_pretrained(find_artifact(fisher, REFERENCE_ANSWERS_FILE))
        references.check_fits(model)
        refused, answered = ([references.rows[i] for i in references.where(kind)] for kind in (REFUSE, COMPLY))
        if not refused or not answered:
            raise ArtifactError(
                f"The reference answers of '{fisher}' are not of both kinds, to refuse and to answer: pass `--protected` rows."
            )
        return refused, answered
    given = driftcaps_requests() if protected is None else load_rows(protected)
    kinds = [select_rows(given, NUM_REFERENCE_ANSWERS, seed, unsafe=unsafe) for unsafe in (True, False)]
    if not kinds[1]:
        raise ValueError(
            f"'{protected}' marks no row to answer (`unsafe: false`), and screening compares rows to refuse with look-alikes."
        )
    kinds = [answered_by(model, tokenizer, rows) if any(map(is_prompt_only, rows)) else rows for rows in kinds]
    kinds = [[with_request(row) for row in rows] for rows in kinds]
    refused, answered = (tokenize_rows(rows, tokenizer, max_length, context_length(model)) for rows in kinds)
    return refused, answered
