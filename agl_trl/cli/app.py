"""The command line `agl-trl`. Heavy imports live inside the commands, so that `--help` is instant."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..artifacts.extras import MissingExtra, needs_trl
from .drift_command import drift
from .shared import MINIWORLD_HELP, quiet


app = typer.Typer(
    name="agl-trl",
    help="Fine-tune aligned models with LoRA without losing their refusals, and measure what was lost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.command()
def demo(
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of repetitions with another adapter init and data order.")
    ] = 1,
    task: Annotated[str, typer.Option(help="Benign task of the embedded world.")] = "extract",
    output_dir: Annotated[Path, typer.Option(help="Folder for adapters, evidence and results.json.")] = Path(
        "outputs/demo"
    ),
) -> None:
    """Fine-tune the embedded model with plain LoRA and with AGL, and compare what is left of its refusals."""
    needs_trl("The trainers of the demo")
    from transformers.utils.logging import disable_progress_bar

    from ..experiments.demo import run_demo

    quiet()
    disable_progress_bar()  # "Loading weights" of a model that loads in a blink
    run_demo(output_dir, seeds=seeds, task=task)


@app.command()
def fisher(
    model: Annotated[str, typer.Option(help=f"Model folder or Hub id; {MINIWORLD_HELP}.")],
    dataset: Annotated[str, typer.Option(help=f"Alignment rows: file or Hub id; {MINIWORLD_HELP}.")],
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder that receives agl/fisher.safetensors; with --push by default outputs/NAME of the repo."
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            help="Repo on the Hub of its own for the statistics and their card, such as user/model-agl-fisher."
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a repo that is created private.")] = False,
    fisher_type: Annotated[
        Literal["projection", "empirical", "mc"], typer.Option(help="What is differentiated for the output side.")
    ] = "projection",
    shrinkage: Annotated[float, typer.Option(min=0, max=1, help="δ; 1 needs forward passes only.")] = 1.0,
    rank: Annotated[int, typer.Option(min=1, help="Eigenpairs kept per covariance.")] = 64,
    num_samples: Annotated[int, typer.Option(min=1, help="Rows used.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of row sample, sketch and projections.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="Type of the weights; default: the checkpoint's.")] = None,
    device_map: Annotated[str | None, typer.Option(help="`auto` spreads a large model over devices.")] = None,
    bits: Annotated[int | None, typer.Option(help="4 or 8: quantise the model with bitsandbytes.")] = None,
    reference_answers: Annotated[
        bool, typer.Option(help="Save and push the model's answers to up to 128 of the rows, too.")
    ] = True,
) -> None:
    """Estimate the Fisher statistics of a model, take its reference answers, save both, and publish them where asked to."""
    from .fisher import fisher

    quiet()
    fisher(
        model=model,
        dataset=dataset,
        output_dir=output_dir,
        push=push,
        private=private,
        fisher_type=fisher_type,
        shrinkage=shrinkage,
        rank=rank,
        num_samples=num_samples,
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        device_map=device_map,
        bits=bits,
        keep_reference_answers=reference_answers,
    )


app.command()(drift)


@app.command()
def screen(
    model: Annotated[str, typer.Option(help=f"Model that is to be trained, folder or Hub id; {MINIWORLD_HELP}.")],
    dataset: Annotated[str, typer.Option(help="Training rows: file or Hub id.")],
    split: Annotated[str, typer.Option(help="Split of a dataset on the Hub.")] = "train",
    config: Annotated[str | None, typer.Option(help="Configuration of a dataset on the Hub.")] = None,
    protected: Annotated[
        str | None,
        typer.Option(
            help="Rows to refuse and look-alikes to answer (column `unsafe`), file or Hub id; default: the model's own answers to DriftCaps."
        ),
    ] = None,
    fisher: Annotated[
        str | None, typer.Option(help="Published statistics, whose reference answers stand for these rows.")
    ] = None,
    scores: Annotated[Path | None, typer.Option(help="JSONL file for the score of every row.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL file for the rows that --drop leaves.")] = None,
    drop: Annotated[
        float | None, typer.Option(help="Leave out those ranked first: a share such as 0.05, or a number of rows.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Longer rows lose their end.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the sample of protected rows.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="Type of the weights; default: the checkpoint's.")] = None,
    device_map: Annotated[str | None, typer.Option(help="`auto` spreads a large model over devices.")] = None,
    bits: Annotated[int | None, typer.Option(help="4 or 8: quantise the model with bitsandbytes.")] = None,
) -> None:
    """Rank the rows of a training set by how much they point against refusals, before anything is trained."""
    from .screen import screen

    quiet()
    screen(
        model=model,
        dataset=dataset,
        split=split,
        config=config,
        protected=protected,
        fisher=fisher,
        scores=scores,
        output=output,
        drop=drop,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        dtype=dtype,
        device_map=device_map,
        bits=bits,
    )


@app.command()
def project(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of the adapter.")],
    base: Annotated[str, typer.Option(help=f"Base model folder or Hub id; {MINIWORLD_HELP}.")],
    budget: Annotated[float, typer.Option(help="Largest mean relative drift of the projected copy.")],
    output_dir: Annotated[Path, typer.Option(help="Folder of the projected copy.")],
    fisher: Annotated[str | None, typer.Option(help="Fisher statistics; default: the adapter's own.")] = None,
) -> None:
    """Write a copy of an adapter that is shrunk to a drift budget, without data and without training."""
    from .project import project

    quiet()
    project(adapter=adapter, base=base, budget=budget, output_dir=output_dir, fisher=fisher)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of an adapter with its evidence.")],
    repo: Annotated[str, typer.Argument(help="Repo on the Hub; created where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a repo that is created private.")] = False,
    fisher: Annotated[
        bool, typer.Option(help="Push the Fisher statistics too; without them no reference answers either.")
    ] = True,
    reference_answers: Annotated[
        bool, typer.Option(help="Push the reference answers too, which hold the protected rows.")
    ] = True,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Push the checkpoints in the folder too.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch.")] = None,
) -> None:
    """Push an adapter with its statistics, report, picture and card in one commit."""
    from .push import push

    quiet()
    push(
        folder=folder,
        repo_id=repo,
        private=private,
        push_fisher=fisher,
        push_reference_answers=reference_answers,
        checkpoints=checkpoints,
        revision=revision,
    )


@app.command()
def attach(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter trained elsewhere, or its Hub id.")],
    base: Annotated[str, typer.Option(help=f"Base model folder or Hub id; {MINIWORLD_HELP}.")],
    fisher: Annotated[
        str | None,
        typer.Option(help="Fisher statistics of the base; default: estimated from its answers to DriftCaps requests."),
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="Prompts to ask, as in `drift`.")] = "driftcaps",
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only so many of them.")] = None,
    judge: Annotated[str, typer.Option(help="Judge of the answers, as in `drift`.")] = "refusal-strings",
    ability: Annotated[list[str] | None, typer.Option(help="Ability set, as in `drift`; may be repeated.")] = None,
    ability_limit: Annotated[
        int | None, typer.Option(min=1, help="Take only so many rows of every ability set.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Of a repo: open a pull request instead of a commit.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 32,
) -> None:
    """Measure an adapter trained elsewhere and add report and card to it: in its folder, or in its repo as one commit."""
    from .attach import attach

    quiet()
    attach(
        adapter=adapter,
        base=base,
        fisher=fisher,
        prompts=prompts,
        limit=limit,
        judge=judge,
        ability=ability or (),
        ability_limit=ability_limit,
        create_pr=create_pr,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )


@app.command()
def space(
    base: Annotated[
        str | None, typer.Option(help=f"Base model: folder or Hub id; default: the adapter's; {MINIWORLD_HELP}.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Adapter: folder or Hub id; default: the demo's, plain and AGL.")
    ] = None,
    push: Annotated[str | None, typer.Option(help="Create or update this Space instead of running here.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a Space that is created private.")] = False,
    hardware: Annotated[str | None, typer.Option(help="Hardware of a new Space, such as `zero-a10g`.")] = None,
    port: Annotated[int | None, typer.Option(help="Port on this machine; default: the first free from 7860.")] = None,
) -> None:
    """Compare refusals of base and fine-tuned models in the browser, on this machine or as a Space on the Hub."""
    from .space import deploy, serve

    quiet()
    if push is None:
        serve(base=base, adapter=adapter, port=port)
    else:
        typer.echo(deploy(push, base=base, adapter=adapter, private=private, hardware=hardware))


@app.command()
def scaling(
    output_dir: Annotated[
        Path, typer.Option(help="Folder for scaling.json, scaling.png and, of the sweep, runs.jsonl.")
    ],
    runs: Annotated[
        Path | None,
        typer.Option(
            help="CSV, TSV or JSON lines: method, n_params, finetune_tokens, loss_before, loss_after; "
            "default: fine-tune the embedded models, about 20 minutes on one core."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every kind in the sweep.")] = 3,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the resamples.")] = 0,
) -> None:
    """Fit the scaling law of forgetting to runs of several sizes and token counts, by method."""
    from .scaling import scaling

    quiet()
    scaling(output_dir=output_dir, runs=runs, seeds=seeds, resamples=resamples, seed=seed)


def main() -> None:
    """Entry point: what can't be done is one sentence on standard error and exit code 2, as for a wrong option."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells at import of kernels that nobody asked for
    try:
        app()
    except (ValueError, OSError, MissingExtra) as error:
        text = str(error)
        if isinstance(error, OSError) and error.strerror:  # without the number in front
            text = error.strerror if error.filename is None else f"{error.strerror}: '{error.filename}'."
        typer.echo(f"agl-trl: {text}", err=True)
        sys.exit(2)  # 1 and 3 are verdicts
