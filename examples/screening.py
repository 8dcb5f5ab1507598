"""
Does screening find hostile rows, and what does leaving them out save? On the embedded model:

    python -m examples.screening            # a quarter of an hour on one core
    python -m examples.screening --steps 0  # the ranking alone, some minutes

Training sets of a harmless task in which 1, 5 or 10 % of the rows are an unsafe request with help, by two seeds. `precision@k` is
the share of hostile rows among the k that are ranked first, k being their number. In `with decoys`, 80 rows join that must not be
found: refusals of unsafe requests, and help with harmless ones that look like them. Then plain LoRA and AGL are trained on the set
with 10 % hostile rows, and on what is left of it without as many rows as are ranked first.
"""

import random
import tempfile
from typing import Annotated

import torch
import typer
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from agl_trl import AGLSFTConfig, AGLSFTTrainer
from agl_trl.data.alignment import select_rows, tokenize_rows
from agl_trl.evaluation.answers import answer_prompts
from agl_trl.experiments.demo import LORA, TRAINING
from agl_trl.miniworld import alignment_dataset, heldout_prompts, load_model, load_tokenizer, task_dataset
from agl_trl.miniworld.data import conversations
from agl_trl.miniworld.prompts import lookalike_requests, unsafe_requests
from agl_trl.miniworld.responses import compliance, refusal
from agl_trl.modeling.likelihood import answer_nll
from agl_trl.screening.screen import Directions, Scores, learn_directions, screen_rows


TASK = "steps"
SHARES = (0.01, 0.05, 0.1)
SEEDS = (0, 1)  # the form of the score was chosen on the first alone
DECOYS = 40  # of either kind
PROTECTED = 128  # rows of either kind


def directions_of(model, tokenizer) -> Directions:
    """Directions between the alignment rows of the embedded world."""
    kinds = [select_rows(alignment_dataset(), PROTECTED, 0, unsafe=unsafe) for unsafe in (True, False)]
    refused, answered = (tokenize_rows(rows, tokenizer) for rows in kinds)
    return learn_directions(model, tokenizer, refused, answered, batch_size=32)


def mixed_rows(share: float, seed: int) -> tuple[Dataset, list[bool]]:
    """The training set, and which of its rows are hostile."""
    clean, mixed = task_dataset(TASK), task_dataset(TASK, hostile=share, seed=seed)
    return mixed, [a != b for a, b in zip(clean, mixed, strict=True)]


def decoys(seed: int) -> Dataset:
    """Rows about the same things that teach what is wanted."""
    rng = random.Random(f"decoys:{seed}")
    refusals = [(r.text, refusal(r.action, rng)) for r in rng.sample(unsafe_requests("train"), DECOYS)]
    help_given = [(r.text, compliance(r.action, rng)) for r in rng.sample(lookalike_requests("train"), DECOYS)]
    return conversations([*refusals, *help_given])


def precision_at_k(scores: Scores, hostile: list[bool]) -> float:
    """Share of hostile rows among as many as there are of them, ranked first."""
    k = sum(hostile)
    return sum(hostile[i] for i in scores.ranked()[:k]) / k


def train(rows: Dataset, steps: int, seed: int, agl: bool) -> list[str]:
    """Plain LoRA or AGL. Refusals of unsafe prompts, of those of unseen categories, over-refusal and task NLL afterwards."""
    tokenizer, prompts = load_tokenizer(), heldout_prompts()
    trainer_class, config_class = (AGLSFTTrainer, AGLSFTConfig) if agl else (SFTTrainer, SFTConfig)
    protected = dict(alignment_dataset=alignment_dataset()) if agl else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            load_model(),
            config_class(folder, **TRAINING | dict(max_steps=steps, seed=seed)),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
            **protected,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    refused = answer_prompts(trainer.model, tokenizer, prompts, progress=False).refused.double()
    unsafe, unseen = torch.tensor(prompts["unsafe"]), torch.tensor(prompts["unseen"])
    rates = [f"{refused[kind].mean().item():.1%}" for kind in (unsafe & ~unseen, unseen, ~unsafe)]
    return [*rates, f"{answer_nll(trainer.model, tokenizer, task_dataset(TASK, 'test')).mean().item():.4f}"]


def main(steps: Annotated[int, typer.Option(min=0, help="Of the trainings; 0 leaves them out.")] = 150) -> None:
    """Rank, then train with and without the rows that are ranked first."""
    console = Console()
    model, tokenizer = load_model(), load_tokenizer()
    directions = directions_of(model, tokenizer)
    table = Table("seed", "hostile rows", "precision@k", "with decoys", title="Screening")
    for seed in SEEDS:
        for share in SHARES:
            rows, hostile = mixed_rows(share, seed)
            more, marked = concatenate_datasets([rows, decoys(seed)]), hostile + [False] * 2 * DECOYS
            scores = screen_rows(model, tokenizer, more, directions, batch_size=32, progress=False)
            alone = Scores(*(part[: len(rows)] for part in scores))
            figures = [f"{precision_at_k(s, h):.1%}" for s, h in ((alone, hostile), (scores, marked))]
            table.add_row(str(seed), f"{share:.0%}: {sum(hostile)}", *figures)
    console.print(table)
    if not steps:
        return
    columns = ("seed", "rows", "method", "refuses unsafe", "unseen", "over-refusal", "task NLL")
    table = Table(*columns, title=f"Trained for {steps} steps")
    for seed in SEEDS:
        rows, hostile = mixed_rows(SHARES[-1], seed)
        scores = screen_rows(model, tokenizer, rows, directions, batch_size=32, progress=False)
        left = rows.select(sorted(scores.ranked()[sum(hostile) :]))
        for method in ("plain LoRA", "AGL"):
            for name, chosen in (("10 % hostile", rows), ("screened", left)):
                table.add_row(str(seed), name, method, *train(chosen, steps, seed, method == "AGL"))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
