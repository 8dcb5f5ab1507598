"""What `agl-trl drift` does."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import typer
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..artifacts.files import (
    ADAPTER_FILE,
    DRIFT_FILE,
    FISHER_FILE,
    FOLDER,
    ArtifactError,
    sha256,
)
from ..artifacts.location import adapter_folder
from ..data.alignment import driftcaps_requests
from ..data.rows import questions_of
from ..drift.gate import certain_already
from ..drift.report import DriftReport
from ..evaluation.abilities import measure_abilities
from ..evaluation.answer_cache import AnswerCache
from ..evaluation.behaviour import measure_behaviour
from ..evaluation.judges import load_judge
from ..fisher.estimate import estimate_fisher
from ..fisher.partial_sums import weights_fingerprint
from ..fisher.statistics import FisherStatistics
from ..modeling.loading import load_adapter, load_model
from ..modeling.lora import linear_layers
from ..modeling.own_tokenizer import difference, own_tokenizer
from .drift_asked import check_files, described, load_asked, rules_of
from .drift_written import write_drift


def drift(
    *,
    base: str,
    output_dir: Path,
    adapter: str | None = None,
    tuned: str | None = None,
    fisher: str | None,
    prompts: str | None,
    limit: int | None,
    judge: str,
    suite: str | None = None,
    ability: Sequence[str] = (),
    ability_limit: int | None = None,
    fail_if: Sequence[str] = (),
    sequential: bool = False,
    html: Path | None = None,
    with_answers: bool = False,
    junit: Path | None = None,
    max_new_tokens: int,
    batch_size: int,
) -> None:
    """
    Measure, write `agl/drift.safetensors`, `agl/drift.png` and `answers.jsonl`, print the summary, judge it by the conditions.
    Everything that can be wrong with the arguments is told before a model is loaded.

    Args:
        base (`str`):
            Folder or Hub id of the base model, or `"miniworld"`.
        output_dir (`Path`):
            Folder of what is written.
        adapter (`str`, *optional*):
            Folder or Hub id of the adapter to measure.
        tuned (`str`, *optional*):
            Folder or Hub id of the checkpoint to measure, in place of an adapter.
        fisher (`str`, *optional*):
            Folder or Hub id of Fisher statistics; by default the adapter's own, or else estimated.
        prompts (`str`, *optional*):
            Prompts to ask, as [`load_prompts`] takes them; by default none.
        limit (`int`, *optional*):
            Number of prompts asked.
        judge (`str`):
            Judge of the answers, as [`load_judge`] takes it.
        suite (`str`, *optional*):
            `"abilities"` for the suite of public ability sets.
        ability (`Sequence[str]`, *optional*):
            Ability sets, as [`load_ability`] takes them.
        ability_limit (`int`, *optional*):
            Most rows of every ability set.
        fail_if (`Sequence[str]`, *optional*):
            Conditions of which none may hold.
        sequential (`bool`, *optional*, defaults to `False`):
            Whether to stop asking as soon as the verdict is certain.
        html (`Path`, *optional*):
            Page to write.
        with_answers (`bool`, *optional*, defaults to `False`):
            Whether the page has prompts and answers, folded.
        junit (`Path`, *optional*):
            JUnit file to write, with one test case for every condition.
        max_new_tokens (`int`):
            Longest answer.
        batch_size (`int`):
            Prompts per batch.

    Raises:
        `ValueError`: For arguments that contradict each other or don't load.
        `OSError`: If a folder can't be written.
        `typer.Exit`: With the exit code of a verdict that is not *pass*.
    """
    if (adapter is None) == (tuned is None):
        raise ValueError("Name what to measure: either `--adapter`, or `--tuned` for a checkpoint of its own.")
    conditions = rules_of(
        fail_if, sequential=sequential, prompts=prompts, html=html, with_answers=with_answers, junit=junit
    )
    check_files(output_dir, html, junit)
    asked = load_judge(judge, batch_size)
    questions, unsafe, sets, conditions = load_asked(
        prompts, limit, conditions, ability=ability, suite=suite is not None, ability_limit=ability_limit
    )
    folder = None if adapter is None else adapter_folder(adapter)
    statistics = _given_statistics(fisher, folder)
    if folder is not None:
        _note_foreign_report(folder)

    model, tokenizer = load_model(base)
    base_model, own = None, None  # in the model of an adapter
    if folder is not None:
        model = load_adapter(model, folder)
    elif tuned is not None:
        base_model, (model, own) = model, load_model(tuned)
    estimates = statistics is None and bool(linear_layers(base_model or model))
    if estimates or questions is not None:  # which are conversations, whatever they were written as
        _check_chat_template(tokenizer, base, folder)
    set_aside = None if questions is None else _tokenizer_set_aside(own, tokenizer, folder, questions)
    if estimates:
        typer.echo("No Fisher statistics: taking them from the base model's own answers to requests of DriftCaps.")
        statistics = _own_statistics(base_model or model, tokenizer)

    measured = _measured(model, base_model, statistics)
    if questions is None and not sets and measured.without_weights is not None and not measured.uncovered:
        raise ValueError(f"There is nothing to measure without `--prompts`, since {measured.without_weights}.")
    measured.adapter_sha256 = None if folder is None else sha256(folder / ADAPTER_FILE)
    # A folder may be trained into again.
    weights = [weights_fingerprint(side) for side in (model, base_model) if side is not None]
    settings = json.dumps([base, measured.adapter_sha256 or tuned, max_new_tokens, *weights])
    # Answers of this very adapter under these settings, where asking was interrupted; gone when the report is there.
    unfinished = output_dir / f"unfinished-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.jsonl"
    store = AnswerCache(unfinished, settings)
    measured.abilities = measure_abilities(
        model, tokenizer, sets, base=base_model, store=store, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    if questions is not None:
        measured.behaviour = measure_behaviour(
            model,
            tokenizer,
            questions,
            base=base_model,
            judge=asked,
            store=store,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            certain=partial(certain_already, measured, conditions, unsafe)
            if sequential and unsafe is not None
            else None,
        )
        if set_aside is not None:
            measured.behaviour.metadata["tokenizer_set_aside"] = set_aside
        measured.behaviour.metadata["prompts"] = described(prompts or "", questions)

    write_drift(
        measured,
        conditions,
        output_dir=output_dir,
        unfinished=unfinished,
        base=base,
        tuned=adapter or tuned or "",
        options=dict(
            base=base,
            adapter=adapter,
            tuned=tuned,
            fisher=fisher,
            prompts=prompts,
            limit=limit,
            judge=judge,
            suite=suite,
            ability=ability,
            ability_limit=ability_limit,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            fail_if=conditions,
            sequential=sequential,
        ),
        html=html,
        with_answers=with_answers,
        junit=junit,
    )


def _given_statistics(fisher: str | None, folder: Path | None) -> FisherStatistics | None:
    """Statistics by name, or else those that lie beside the adapter."""
    if fisher is not None:
        return FisherStatistics.from_pretrained(fisher)
    if folder is not None and (folder / FOLDER / FISHER_FILE).is_file():
        return FisherStatistics.from_pretrained(folder)
    return None


def _own_statistics(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> FisherStatistics:
    """Statistics from the base model's own answers, with the adapter switched off."""
    with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        return estimate_fisher(model, driftcaps_requests(), tokenizer)


def _check_chat_template(tokenizer: PreTrainedTokenizerBase, base: str, folder: Path | None) -> None:
    """
    Check that conversations can be put to the base model.

    Raises:
        `ValueError`: If it has no chat template; where the adapter brings one, it says so.
    """
    if tokenizer.chat_template is not None:
        return
    advice = (
        "set `chat_template` of its tokenizer, save both in a folder and name that as `--base`; without one it takes `--fisher` and "
        "no `--prompts`"
    )
    if folder is not None:
        config = folder / "tokenizer_config.json"
        named = config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8", errors="replace")
        for path in (folder / "chat_template.jinja", *([config] if named else [])):
            if path.is_file():
                advice = (
                    f"the adapter brings its own in '{path.name}': save the base model with the adapter's tokenizer, so that both are "
                    "asked in the same words, and name that folder as `--base`"
                )
                break
    raise ValueError(f"The base model '{base}' has no chat template to write conversations with; {advice}.")


def _tokenizer_set_aside(
    own: PreTrainedTokenizerBase | None, tokenizer: PreTrainedTokenizerBase, folder: Path | None, questions: Dataset
) -> str | None:
    """
    One sentence where the tuned model brings a tokenizer (`own`, or that of an adapter's folder) that asks otherwise than the base
    model's, with which both are asked.
    """
    try:
        own = own if folder is None else own_tokenizer(folder, tokenizer)
        differs = None if own is None else difference(own, tokenizer, questions_of(questions))
    except ArtifactError as error:
        differs = f"was not looked at ({str(error).rstrip('.')})"
    if differs is None:
        return None
    sentence = (
        f"Both models were asked with the base model's tokenizer and chat template; the tuned model's own {differs}."
    )
    advice = "To ask both in its words, save the base model with that tokenizer and name the folder as `--base`."
    typer.echo(f"Note: {sentence} {advice}")
    return sentence


def _note_foreign_report(folder: Path) -> None:
    """Say so where a report lies beside an adapter that is not of it: it is made anew in any case, but somebody may rely on it."""
    if (folder / FOLDER / DRIFT_FILE).is_file():
        try:
            DriftReport.from_pretrained(folder / FOLDER / DRIFT_FILE).check_describes(folder)
        except ArtifactError as error:
            typer.echo(f"Note on the report that came with the adapter: {error}")


def _measured(
    model: PreTrainedModel | PeftModel, base: PreTrainedModel | None, statistics: FisherStatistics | None
) -> DriftReport:
    """Drift of a model's weights: of its adapter, or from a base model beside it."""
    if statistics is None:
        return DriftReport.measure(model, None)
    layers = linear_layers(model if base is None else base, head=True)
    if base is not None:  # of a checkpoint, the layers that the statistics cover
        layers = {name: module for name, module in layers.items() if name in statistics.input_of}
    if layers:
        statistics.check_fits(model if base is None else base, layers)
    if base is None:
        return DriftReport.measure(model, statistics)
    return DriftReport.measure_checkpoint(base, model, statistics)
