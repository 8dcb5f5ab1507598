"""
A drifted adapter shrunk to ever smaller budgets after training: what comes back, and what the task pays:

    agl-trl demo --output-dir outputs/demo
    python -m examples.benchmark.project --folder outputs/demo
"""

from pathlib import Path
from typing import Annotated

import typer
from peft import PeftModel
from rich.console import Console
from rich.table import Table

from agl_trl import DriftReport, FisherStatistics
from agl_trl.drift.projection import strength_for
from agl_trl.experiments.demo import evaluate
from agl_trl.miniworld import heldout_prompts, load_model, load_tokenizer, task_dataset
from agl_trl.modeling.lora import adapted_layers

from .run import quiet


BUDGETS = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)


def main(
    folder: Annotated[Path, typer.Option(help="Folder of a demo.")] = Path("outputs/demo"),
    task: Annotated[str, typer.Option(help="Task the demo trained on.")] = "extract",
) -> None:
    """Print the curve of the demo's plain LoRA adapter, with the demo's AGL adapter beside it."""
    quiet()
    statistics, tokenizer = FisherStatistics.from_pretrained(folder), load_tokenizer()
    prompts, test = heldout_prompts(), task_dataset(task, "test")
    table = Table(
        "adapter", "budget", "relative drift", "refuses unsafe", "unseen", "over-refusal", "task NLL", "exact match"
    )
    for name, source, budget in (
        ("trained with AGL", folder, None),
        ("plain LoRA", folder / "lora", None),
        *(("plain LoRA, projected", folder / "lora", budget) for budget in BUDGETS),
    ):
        model = PeftModel.from_pretrained(load_model(), source)
        if budget is not None:
            layers = adapted_layers(model)
            for layer, A in zip(layers, strength_for(layers, statistics, budget)[1], strict=True):
                layer.parameters()[0].data.copy_(A)
        _, run = evaluate(name, 0, model, tokenizer, prompts, test, progress=False)
        drift = DriftReport.measure(model, statistics).mean_relative_drift
        shares = (f"{value:.1%}" for value in (run.refusal_unsafe, run.refusal_unseen, run.over_refusal))
        figures = (f"{run.task_nll:.4f}", f"{run.task_exact:.1%}")
        table.add_row(name, "" if budget is None else f"{budget:g}", f"{drift:.1e}", *shares, *figures)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
