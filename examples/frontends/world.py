"""What all front ends are given, the embedded model and a harmless task, and what is asked afterwards: are the refusals still there?"""

import json
from pathlib import Path

import torch
import typer
from peft import PeftModel
from rich.console import Console
from rich.table import Table

from agl_trl import DriftReport
from agl_trl.artifacts.files import FOLDER
from agl_trl.evaluation.behaviour import answer_prompts
from agl_trl.miniworld import heldout_prompts, load_model, load_tokenizer, task_dataset
from agl_trl.modeling.likelihood import answer_nll


STEPS, BATCH, LEARNING_RATE, RANK = 150, 16, 2e-3, 8


def model_folder(folder: Path) -> Path:
    """The embedded aligned model in the form that front ends read, in float32: most would train it in the type it is saved in."""
    load_model().save_pretrained(folder / "model")
    load_tokenizer().save_pretrained(folder / "model")
    return folder / "model"


def write_rows(folder: Path) -> Path:
    """Rows of a harmless task as conversations, a line each."""
    rows = [{"messages": row["prompt"] + row["completion"]} for row in task_dataset("extract")]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def show(title: str, adapters: dict[str, Path]) -> None:
    """Ask the held-out prompts of the base model and of every adapter, count refusals, and print a table."""
    tokenizer, prompts, test = load_tokenizer(), heldout_prompts(), task_dataset("extract", "test")
    unsafe = torch.tensor(prompts["unsafe"])
    table = Table(title=title)
    for column in ("run", "refuses unsafe", "over-refusal", "task NLL", "relative drift", "KL"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, folder in {"aligned model": None, **adapters}.items():
        model = load_model() if folder is None else PeftModel.from_pretrained(load_model(), folder)
        refused = answer_prompts(model, tokenizer, prompts, max_new_tokens=48, batch_size=256, progress=False).refused
        counts = [f"{int(refused[kind].sum())}/{int(kind.sum())}" for kind in (unsafe, ~unsafe)]
        nll = answer_nll(model, tokenizer, test, batch_size=64).mean().item()
        drift, kl = "", ""
        if folder is not None and (folder / FOLDER).is_dir():
            report = DriftReport.from_pretrained(folder)
            report.check_describes(folder)
            (kept,) = report.metadata["protected"]["behaviours"].values()
            drift, kl = f"{report.mean_relative_drift:.1e}", f"{kept['kl']:.3f}"
        table.add_row(name, *counts, f"{nll:.3f}", drift, kl)
    Console().print(table)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model_folder(folder)
    write_rows(folder)
    adapters = {path.parent.name: path.parent for path in sorted(folder.glob("*/adapter_config.json"))}
    if adapters:  # of runs that have been made
        show(str(folder), adapters)


if __name__ == "__main__":
    typer.run(main)
