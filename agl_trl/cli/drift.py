"""What `agl-trl drift` does."""

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path

import typer
from peft import PeftModel

from ..artifacts.files import (
    ADAPTER_FILE,
    DRIFT_FILE,
    FISHER_FILE,
    FOLDER,
    PICTURE_FILE,
    ArtifactError,
    adapter_folder,
    sha256,
    write_atomically,
)
from ..data.alignment import driftcaps_requests
from ..data.prompts import load_prompts
from ..drift.plots import plot_drift
from ..drift.report import DriftReport
from ..drift.thresholds import Condition
from ..evaluation.answer_cache import AnswerCache
from ..evaluation.behaviour import measure_behaviour
from ..evaluation.judges import load_judge
from ..fisher.estimate import estimate_fisher
from ..fisher.statistics import FisherStatistics
from ..modeling.loading import load_adapter, load_model
from ..modeling.lora import linear_layers


ANSWERS_FILE = "answers.jsonl"


def report(
    base: str,
    output_dir: Path,
    adapter: str | None,
    tuned: str | None,
    fisher: str | None,
    prompts: str | None,
    limit: int | None,
    judge: str,
    fail_if: list[str],
    max_new_tokens: int,
    batch_size: int,
) -> None:
    """
    Measure, write `agl/drift.safetensors`, `agl/drift.png` and `answers.jsonl`, print the summary, check the conditions.
    Everything that can be wrong with the arguments is told before a model is loaded.

    Raises:
        `ValueError`: For arguments that contradict each other, and what a condition forbids.
    """
    if (adapter is None) == (tuned is None):
        raise ValueError("Name what to measure: either `--adapter`, or `--tuned` for a checkpoint of its own.")
    conditions = [Condition.parse(text) for text in fail_if]
    asked = load_judge(judge, batch_size)
    questions = None if prompts is None else load_prompts(prompts, limit)
    folder = None if adapter is None else adapter_folder(adapter)
    statistics = None
    if fisher is not None:
        statistics = FisherStatistics.from_pretrained(fisher)
    elif folder is not None and (folder / FOLDER / FISHER_FILE).is_file():
        statistics = FisherStatistics.from_pretrained(folder)
    if folder is not None and (folder / FOLDER / DRIFT_FILE).is_file():
        try:  # it is made anew here in any case; whoever relied on it should know
            DriftReport.from_pretrained(folder / FOLDER / DRIFT_FILE).check_describes(folder)
        except ArtifactError as error:
            typer.echo(f"Note on the report that came with the adapter: {error}")
    model, tokenizer = load_model(base)
    if folder is not None:
        model = load_adapter(model, folder)
    if statistics is None:
        typer.echo("No Fisher statistics: taking them from the base model's own answers to requests of DriftCaps.")
        with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
            statistics = estimate_fisher(model, driftcaps_requests(), tokenizer)
    layers = linear_layers(model)
    if folder is None:  # of a checkpoint, the layers that the statistics cover
        layers = {name: module for name, module in layers.items() if name in statistics.input_of}
    statistics.check_fits(model, layers)
    base_model, digest = None, None
    if folder is not None:
        measured = DriftReport.measure(model, statistics)
        measured.adapter_sha256 = digest = sha256(folder / ADAPTER_FILE)
    else:
        assert tuned is not None
        base_model, (model, _) = model, load_model(tuned)
        measured = DriftReport.measure_checkpoint(base_model, model, statistics)
    if questions is not None:
        settings = json.dumps([base, digest or tuned, max_new_tokens])
        # Of this very adapter and these settings, whatever was interrupted; gone when the report is there.
        path = output_dir / f"unfinished-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.jsonl"
        measured.behaviour = measure_behaviour(
            model,
            tokenizer,
            questions,
            base=base_model,
            judge=asked,
            store=AnswerCache(path, settings),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        asked_of = (
            Path(prompts or "").name if Path(prompts or "").exists() else prompts
        )  # no path of a machine in a report
        measured.behaviour.metadata["prompts"] = {
            "name": asked_of,
            "license": questions.info.license,
            "count": len(questions),
        }
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in measured.behaviour.answers]
        write_atomically(output_dir / ANSWERS_FILE, "".join(lines).encode())
        path.unlink(missing_ok=True)
    measured.save_pretrained(output_dir)
    plot_drift(measured, output_dir / FOLDER / PICTURE_FILE)
    typer.echo(measured.summary())
    if met := [sentence for sentence in (condition.holds(measured) for condition in conditions) if sentence]:
        raise ValueError("Failed: " + " ".join(met))
