"""
Does one setting mean the same everywhere? Budgets on the embedded models, of three sizes:

    python -m examples.budgets                        # three quarters of an hour on one core
    python -m examples.budgets --kinds text           # some minutes

- `rates`: `kl_budget=0.02` on three sizes, at 0.3, 1 and 3 times the learning rate. What is the KL on protected rows at the end,
  and what is it without AGL?
- `statistics`: the same KL budget without a protected row in the run, translated by the curve of the statistics.
- `text`: general text as a second protected behaviour. What is the NLL of other text of its kind afterwards?

One line of `OUTPUT_DIR/runs.jsonl` for every run as it ends; runs that are there are not made again.
"""

import json
import random
import tempfile
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from agl_trl import AGLSFTConfig, AGLSFTTrainer, estimate_fisher
from agl_trl.artifacts.files import write_atomically
from agl_trl.experiments.demo import LORA, TRAINING
from agl_trl.experiments.scaling_sweep import SIZES
from agl_trl.fisher.calibration import calibrate
from agl_trl.fisher.protected_rows import COMPLY, REFUSE
from agl_trl.miniworld import alignment_dataset, load_model, load_tokenizer, task_dataset
from agl_trl.miniworld.data import conversations, copying_drills
from agl_trl.miniworld.prompts import Split, everyday_requests
from agl_trl.miniworld.responses import compliance
from agl_trl.modeling.likelihood import answer_nll

from .benchmark.run import quiet
from .benchmark.setting import reference_answers


BUDGET = 0.02
RATES = (0.3, 1.0, 3.0)
TASKS = ("steps", "extract")
TEXTS = 64  # to protect with, and as many others to measure on
Line = dict[str, Any]


def train(size: str, task: str, rate: float, seed: int, steps: int, method: str, folder: str, **options: Any) -> Any:
    """One trainer, after training."""
    trainer_class, config_class = (SFTTrainer, SFTConfig) if method == "plain" else (AGLSFTTrainer, AGLSFTConfig)
    settings = TRAINING | dict(learning_rate=TRAINING["learning_rate"] * rate, max_steps=steps, seed=seed)
    data = {}
    if method == "statistics":
        model, tokenizer = load_model(size), load_tokenizer()
        statistics = estimate_fisher(model, alignment_dataset(), tokenizer, progress=False)
        calibrate(model, statistics, reference_answers(model, tokenizer, 0), progress=False)
        settings["fisher_path"] = str(statistics.save_pretrained(folder).parent)
    elif method != "plain":
        data = dict(alignment_dataset=alignment_dataset(), **options)
    if method != "plain":
        settings["kl_budget"] = BUDGET
    trainer = trainer_class(
        model=load_model(size),
        args=config_class(folder, **settings),
        train_dataset=task_dataset(task),
        processing_class=load_tokenizer(),
        peft_config=LoraConfig(**LORA),
        **data,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def on_protected_rows(trainer: Any, size: str, seed: int) -> Line:
    """KL to the model as it was, on the protected rows of either kind."""
    references = reference_answers(load_model(size), load_tokenizer(), seed)
    trainer.model.eval()
    with torch.no_grad():
        kl = references.kl(trainer.model)[:, 0].cpu()
    return {
        "kl": kl.mean().item(),
        "kl_refuse": kl[references.where(REFUSE)].mean().item(),
        "kl_comply": kl[references.where(COMPLY)].mean().item(),
    }


def task_nll(trainer: Any, task: str) -> float:
    return answer_nll(trainer.model, load_tokenizer(), task_dataset(task, "test"), batch_size=64).mean().item()


def texts() -> tuple[Dataset, Dataset]:
    """General text of the embedded world, everyday conversations and copying drills: to protect, and others to measure on."""
    return _lines("train", 1), _lines("heldout", 2)


def _lines(split: Split, seed: int) -> Dataset:
    rng = random.Random(seed)
    requests = rng.sample(everyday_requests(split, frames_each=2), TEXTS // 2)
    pairs = [(request.text, compliance(request.action, rng)) for request in requests]
    pairs += copying_drills(TEXTS // 2, seed)
    tokenizer = load_tokenizer()
    rows = [row["prompt"] + row["completion"] for row in conversations(pairs)]
    return Dataset.from_dict({"text": [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]})


@torch.no_grad()
def text_nll(model: Any, rows: Dataset) -> float:
    """Mean NLL per token of lines of text, each read by itself."""
    tokenizer, total, count = load_tokenizer(), 0.0, 0
    model.eval()
    for text in rows["text"]:
        ids = tokenizer(text, return_tensors="pt").input_ids
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total -= log_probs.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    return total / count


def run(kind: str, size: str, rate: float, task: str, method: str, seed: int, steps: int) -> Line:
    """Train and measure one line of the results."""
    kept, others = texts()
    options = dict(protect={"text": kept}) if method == "agl, text" else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(size, task, rate, seed, steps, method, folder, **options)
        found = {"task_nll": task_nll(trainer, task)} | on_protected_rows(trainer, size, seed)
        if method.startswith("agl"):
            protected = trainer.drift_report().metadata["protected"]
            found |= {"held": protected["behaviours"]["alignment"]["kl"], "scale": protected["scale"]}
        if kind == "text":
            found["text_nll"] = text_nll(trainer.model, others)
            found["text_nll_before"] = text_nll(load_model(size), others)
    return found


def plan(kinds: list[str], seeds: int) -> list[Line]:
    """Runs by their keys."""
    wanted: list[Line] = []
    for seed in range(seeds):
        for size, rate in product(SIZES, RATES):
            if "rates" in kinds:
                methods = ("plain", "agl")
                wanted += [
                    dict(kind="rates", size=size, rate=rate, task=TASKS[0], method=m, seed=seed) for m in methods
                ]
            if "statistics" in kinds:
                wanted.append(
                    dict(kind="statistics", size=size, rate=rate, task=TASKS[0], method="statistics", seed=seed)
                )
        if "text" in kinds:
            methods = ("plain", "agl", "agl, text")
            wanted += [
                dict(kind="text", size=SIZES[-1], rate=1.0, task=task, method=m, seed=seed)
                for task in TASKS
                for m in methods
            ]
    return wanted


def main(
    kinds: Annotated[str, typer.Option(help="rates, statistics, text, with commas.")] = "rates,statistics,text",
    seeds: Annotated[int, typer.Option(help="Repetitions.")] = 1,
    steps: Annotated[int, typer.Option(help="Optimizer steps of every run.")] = 150,
    output_dir: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("outputs/budgets"),
) -> None:
    quiet()
    chosen = kinds.split(",")
    if unknown := {*chosen} - {"rates", "statistics", "text"}:
        raise typer.BadParameter(f"there is no '{min(unknown)}'", param_hint="--kinds")
    path, console = output_dir / "runs.jsonl", Console()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    table = Table("", "KL", "to refuse", "look-alikes", "of budget", "scale", "task NLL", "text NLL")
    for wanted in plan(chosen, seeds):
        key = wanted | {"steps": steps}
        found = next((line for line in lines if line.items() >= key.items()), None)
        if found is None:
            found = key | run(**key)
            lines.append(found)
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        share = found.get("held", found["kl"]) / BUDGET
        text = f"{found['text_nll']:.4f} (before {found['text_nll_before']:.4f})" if "text_nll" in found else ""
        scale = f"{found['scale']:.3f}" if "scale" in found else ""
        table.add_row(
            ", ".join(str(key[name]) for name in ("size", "rate", "task", "method", "seed")),
            *(f"{found[name]:.4f}" for name in ("kl", "kl_refuse", "kl_comply")),
            f"{share:.2f}",
            scale,
            f"{found['task_nll']:.4f}",
            text,
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
