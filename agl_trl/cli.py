"""The command line `agl-trl`. Heavy imports live inside the commands, so that `--help` is instant."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

app = typer.Typer(
    name="agl-trl",
    help="Fine-tune aligned models with LoRA without losing their refusals, and measure what was lost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
MINIWORLD_HELP = "`miniworld` is the embedded one"


class FisherType(StrEnum):
    projection = "projection"
    empirical = "empirical"
    mc = "mc"


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
    from transformers.utils.logging import disable_progress_bar

    from .demo import run_demo

    _quiet()
    disable_progress_bar()  # "Loading weights" of a model that loads in a blink
    run_demo(output_dir, seeds=seeds, task=task)


@app.command()
def fisher(
    model: Annotated[str, typer.Option(help=f"Model folder or Hub id; {MINIWORLD_HELP}.")],
    dataset: Annotated[str, typer.Option(help=f"Alignment rows: file or Hub id; {MINIWORLD_HELP}.")],
    output_dir: Annotated[Path, typer.Option(help="Folder that receives agl/fisher.safetensors.")],
    fisher_type: Annotated[
        FisherType, typer.Option(help="What is differentiated for the output side.")
    ] = FisherType.projection,
    damping: Annotated[float, typer.Option(min=0, max=1, help="δ; 1 needs forward passes only.")] = 1.0,
    rank: Annotated[int, typer.Option(min=1, help="Eigenpairs kept per covariance.")] = 64,
    num_samples: Annotated[int, typer.Option(min=1, help="Rows used.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of row sample, sketch and projections.")] = 0,
) -> None:
    """Estimate the Fisher statistics of a model and save them."""
    from .data import load_rows
    from .estimation import estimate_fisher

    _quiet()
    rows = load_rows(dataset)
    loaded, tokenizer = _load_model(model)
    statistics = estimate_fisher(
        loaded,
        rows,
        tokenizer,
        fisher_type=fisher_type.value,
        damping=damping,
        rank=rank,
        num_samples=num_samples,
        batch_size=batch_size,
        seed=seed,
    )
    path = statistics.save_pretrained(output_dir)
    typer.echo(
        f"{path}: {len(statistics.input_of)} layers, {len(statistics.inputs)} shared inputs, {statistics.num_tokens} tokens, "
        f"{path.stat().st_size / 1e6:.1f} MB"
    )


@app.command()
def drift(
    base: Annotated[str, typer.Option(help=f"Base model folder or Hub id; {MINIWORLD_HELP}.")],
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    output_dir: Annotated[Path, typer.Option(help="Folder that receives agl/drift.safetensors and agl/drift.png.")],
    fisher: Annotated[
        Path | None, typer.Option(help="Fisher statistics; default: those of the adapter's folder.")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help=f"Prompts to ask: file or Hub id; {MINIWORLD_HELP}.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 32,
) -> None:
    """Report how far an adapter has moved its base model: weights per layer, and answers where prompts are given."""
    from .artifacts import FOLDER, PICTURE_FILE, sha256
    from .comparison import measure_behaviour
    from .data import load_rows
    from .demo import heldout_prompts
    from .drift import DriftReport
    from .fisher import FisherStatistics
    from .lora import linear_layers
    from .plots import plot_drift

    _quiet()
    statistics = FisherStatistics.from_pretrained(fisher or adapter)
    questions = None if prompts is None else heldout_prompts() if prompts == "miniworld" else load_rows(prompts)
    model, tokenizer = _load_model(base)
    model = _load_adapter(model, adapter)
    statistics.check_fits(model, linear_layers(model))
    report = DriftReport.measure(model, statistics)
    report.adapter_sha256 = sha256(adapter / "adapter_model.safetensors")
    if questions is not None:
        report.behaviour = measure_behaviour(
            model, tokenizer, questions, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
    report.save_pretrained(output_dir)
    plot_drift(report, output_dir / FOLDER / PICTURE_FILE)
    typer.echo(report.summary())


def _quiet() -> None:
    """Without the notices of the libraries below that a reader of the output can do nothing about."""
    import logging
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()


def _load_model(name: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name == "miniworld":
        from .miniworld import load_model, load_tokenizer

        return load_model(), load_tokenizer()
    try:
        model = AutoModelForCausalLM.from_pretrained(name).to(PartialState().device)
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"Can't load the model '{name}': {str(error).splitlines()[0].rstrip('.')}.") from error


def _load_adapter(model: "PreTrainedModel", folder: Path):
    from peft import PeftModel
    from safetensors import SafetensorError

    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"There is no adapter in '{folder}': 'adapter_model.safetensors' is missing.")
    try:
        return PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0].rstrip(".:")
        raise ValueError(f"The adapter in '{folder}' does not load into this base model: {reason}.") from error


def main() -> None:
    """Entry point: a failure is one sentence on standard error and exit code 1."""
    try:
        app()
    except (ValueError, OSError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        typer.echo(f"agl-trl: {text}", err=True)
        sys.exit(1)
