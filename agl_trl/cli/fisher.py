"""What `agl-trl fisher` does."""

from pathlib import Path

import typer
from huggingface_hub import HfApi
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..artifacts.files import FISHER_FILE, FOLDER, REFERENCE_ANSWERS_FILE, check_writable
from ..artifacts.location import hub_id
from ..artifacts.upload import FAILURES, PushError, create_repo
from ..data.alignment import raw_text_warning, select_rows, tokenize_rows
from ..data.files import is_file, load_rows
from ..data.rows import Row, is_prompt_only
from ..fisher.calibration import calibrate
from ..fisher.cost import fisher_cost, seconds_by_trial
from ..fisher.estimate import FisherType, estimate_fisher
from ..fisher.protected_rows import (
    NUM_REFERENCE_ANSWERS,
    num_look_alikes,
    reference_answers,
    with_look_alikes,
)
from ..fisher.reference_answers import ReferenceAnswers
from ..fisher.statistics import FisherStatistics
from ..hub.card_metadata import STATISTICS_TAG, Readme
from ..hub.model_card import write_statistics_card
from ..hub.push import push_folder
from ..modeling.forward import context_length
from ..modeling.generation import answered_by
from ..modeling.loading import load_model


MAX_LENGTH = 1024
SHOWN_LAYERS = 4
MODEL_FILES = ("config.json", "adapter_config.json")


def fisher(
    *,
    model: str,
    dataset: str,
    output_dir: Path | None,
    push: str | None,
    private: bool,
    fisher_type: FisherType,
    shrinkage: float,
    rank: int,
    num_samples: int,
    batch_size: int,
    seed: int,
    dtype: str | None,
    device_map: str | None,
    bits: int | None,
    keep_reference_answers: bool,
) -> None:
    """
    Say what it will take, estimate, take reference answers and what a drift means in KL on them, save, and push where asked to: a
    repo that holds all this and a card. Interrupted, the same command goes on where it stopped.

    Args:
        model (`str`):
            Folder or Hub id of the model, or `"miniworld"`.
        dataset (`str`):
            Alignment rows, as [`load_rows`] takes them.
        output_dir (`Path`, *optional*):
            Folder of the statistics; by default one of the name of the repo, in `outputs`.
        push (`str`, *optional*):
            Repo on the Hub for statistics and card.
        private (`bool`):
            Whether a repo that has to be created is private.
        dtype, device_map, bits:
            As in [`load_model`].
        keep_reference_answers (`bool`):
            Whether the reference answers are saved and pushed; they hold the rows themselves.
        fisher_type, shrinkage, rank, num_samples, batch_size, seed:
            As in [`estimate_fisher`].

    Raises:
        `ValueError`: If the arguments contradict each other, model or rows can't be read, or a card that is pushed would replace
            another one.
        `OSError`: If the folder can't be written.
        [`PushError`]: If the repo can't be written; told before the pass where the Hub says so by then.
    """
    if bits not in (None, 4, 8):
        raise ValueError(f"`--bits` must be 4 or 8, got {bits}.")
    if output_dir is None:
        if push is None:
            raise ValueError("Say where the statistics go: `--output-dir`, `--push`, or both.")
        output_dir = Path("outputs") / push.split("/")[-1]
    check_writable(output_dir)
    if push is not None:
        check_card_folder(output_dir)
    repo_id = None if push is None else statistics_repo(push, private=private)
    given = load_rows(dataset)
    selected = select_rows(given, num_samples, seed)
    others = select_rows(given, num_look_alikes(NUM_REFERENCE_ANSWERS), seed, unsafe=False)
    loaded, tokenizer = load_model(model, dtype=dtype, device_map=device_map, bits=bits)
    if (warning := raw_text_warning(selected[0], tokenizer)) is not None:
        typer.echo(warning, err=True)
    plan = fisher_cost(loaded, rank=rank, shrinkage=shrinkage)
    typer.echo(
        f"{plan.layers} layers, {plan.inputs} shared inputs; {plan.accumulator_bytes / 1e6:.0f} MB of sums beside the model, "
        f"{plan.file_bytes / 1e6:.1f} MB on disk"
    )
    if any(map(is_prompt_only, selected)):
        typer.echo(f"{len(selected)} requests, which the model answers first")
        selected = answered_by(loaded, tokenizer, selected)
    else:
        rows = tokenize_rows(selected, tokenizer, MAX_LENGTH, context_length(loaded))
        seconds = seconds_by_trial(
            loaded,
            rows,
            tokenizer,
            fisher_type=fisher_type,
            rank=rank,
            shrinkage=shrinkage,
            batch_size=batch_size,
            seed=seed,
        )
        count = -(-len(rows) // batch_size)
        passes = f"{count} forward {'' if shrinkage == 1 else 'and backward '}{'pass' if count == 1 else 'passes'}"
        typer.echo(
            f"{len(rows)} rows, {sum(len(row.input_ids) for row in rows)} tokens, {passes}, about {seconds:.1f} s"
        )
    statistics = estimate_fisher(
        loaded,
        selected,
        tokenizer,
        fisher_type=fisher_type,
        shrinkage=shrinkage,
        rank=rank,
        num_samples=None,
        batch_size=batch_size,
        max_length=MAX_LENGTH,
        seed=seed,
        resume_dir=output_dir,
    )
    statistics.metadata["dataset"] = dataset_id(dataset)
    if skipped := statistics.metadata["skipped_layers"]:
        shown = ", ".join(skipped[:SHOWN_LAYERS]) + (", ..." if len(skipped) > SHOWN_LAYERS else "")
        typer.echo(f"Left out, because they do not see every token of a text: {len(skipped)} layers ({shown})")
    statistics.save_pretrained(output_dir)  # a pass may have taken hours
    references = take_references(loaded, tokenizer, selected, others)
    calibrate(loaded, statistics, references, seed=seed)
    path = statistics.save_pretrained(output_dir)
    typer.echo(
        f"{path}: {len(statistics.input_of)} layers, {len(statistics.inputs)} shared inputs, {statistics.num_tokens} tokens, "
        f"{path.stat().st_size / 1e6:.1f} MB"
    )
    answers = output_dir / FOLDER / REFERENCE_ANSWERS_FILE
    if keep_reference_answers:
        references.save_pretrained(output_dir)
        typer.echo(f"{answers}: {len(references.rows)} rows, {answers.stat().st_size / 1e3:.0f} KB")
    else:
        answers.unlink(missing_ok=True)  # of an earlier run
    if repo_id is not None:
        kept = references if keep_reference_answers else None
        typer.echo(push_statistics(statistics, kept, output_dir, repo_id))


def take_references(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, refusals: list[Row], others: list[Row]
) -> ReferenceAnswers:
    """Reference answers of answered rows to refuse and of rows that only look like them, which the model may have to answer first."""
    if any(map(is_prompt_only, others)):
        others = answered_by(model, tokenizer, others)
    kinds = with_look_alikes(refusals, others, NUM_REFERENCE_ANSWERS)
    return reference_answers(model, tokenizer, kinds, max_length=MAX_LENGTH)


def check_card_folder(folder: Path) -> None:
    """
    Check that a card of statistics may be written to a folder.

    Raises:
        `ValueError`: If it would replace that of a model or an adapter, or a text that somebody wrote, or the card can't be read.
    """
    if models := [name for name in MODEL_FILES if (folder / name).is_file()]:
        raise ValueError(
            f"'{folder}' holds a model ('{models[0]}'), whose card this would replace: name another `--output-dir`."
        )
    card = folder / "README.md"
    there = Readme.read(card)
    if there.text.strip() and STATISTICS_TAG not in (there.metadata.get("tags") or ()):
        raise ValueError(f"'{card}' is no card of statistics, and this would replace it: name another `--output-dir`.")


def statistics_repo(name: str, *, private: bool) -> str:
    """
    Make sure that there is a repo for statistics, which this account may write. Returns its full id.

    Raises:
        [`PushError`]: If it can't be made or written, or holds a model, whose card the one of the statistics would replace.
    """
    repo_id = create_repo(name, private=private or None)
    api = HfApi()
    try:
        api.auth_check(repo_id, write=True)  # of a repo that was there already
        there = api.list_repo_files(repo_id)
    except FAILURES as error:
        raise PushError.because(f"Can't write to '{repo_id}'", error) from error
    if models := sorted(file for file in there if Path(file).name in MODEL_FILES):
        raise PushError(
            f"'{repo_id}' holds a model ('{models[0]}'), whose card this would replace: name another repo."
        )
    return repo_id


def push_statistics(
    statistics: FisherStatistics, references: ReferenceAnswers | None, folder: Path, repo_id: str
) -> str:
    """
    Push statistics, reference answers where there are some, and their card, and nothing else of the folder, in one commit.
    Returns the address of the commit.
    """
    write_statistics_card(folder / "README.md", repo_id.split("/")[-1], statistics, references, repo_id=repo_id)
    files = ["README.md", f"{FOLDER}/{FISHER_FILE}"]
    if references is not None:
        files.append(f"{FOLDER}/{REFERENCE_ANSWERS_FILE}")
    return push_folder(folder, repo_id, message="Fisher statistics", files=files).commit_url


def dataset_id(name: str) -> str | None:
    """Name of a dataset that others know: an id on the Hub or an embedded set, never a file of this machine."""
    if Path(name).exists() or is_file(name):
        return None
    return hub_id(name)
