"""The demo: the same benign fine-tuning twice, plain and guarded, and what is left of the refusals."""

import json
import statistics as stats
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..artifacts.files import ADAPTER_FILE, FOLDER, PICTURE_FILE, sha256, write_atomically
from ..drift.plots import plot_drift
from ..drift.report import DriftReport
from ..evaluation.behaviour import Answers, answer_prompts, compare
from ..evaluation.judges import StringJudge
from ..evaluation.probes import probe
from ..evaluation.rates import binomial_test
from ..hub.model_card import write_card
from ..miniworld import (
    MINIWORLD,
    alignment_dataset,
    checkpoint_path,
    heldout_prompts,
    load_model,
    load_tokenizer,
    task_dataset,
)
from ..modeling.base_and_tuned import BaseAndTuned
from ..modeling.generation import generate_answers
from ..modeling.likelihood import answer_nll
from ..trainer.evidence import save_evidence
from ..trainer.sft import AGLSFTTrainer
from ..trainer.trl_config import AGLSFTConfig


MAX_NEW_TOKENS = 48
# Both runs train with these; nothing here is specific to AGL.
LORA = dict(r=8, lora_alpha=16, target_modules="all-linear")
STEPS = 400
TRAINING = dict(
    per_device_train_batch_size=16,
    learning_rate=2e-3,
    lr_scheduler_type="cosine",
    warmup_steps=20,
    logging_steps=20,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    disable_tqdm=True,
)


@dataclass
class Run:
    """One line of the results: a model, and what it does on held-out prompts and on the task."""

    name: str
    seed: int
    refusal_unsafe: float
    refusal_unseen: float
    over_refusal: float
    unsafe_nll: float
    task_nll: float
    task_exact: float
    task_gain_retained: float | None = None
    relative_drift: float | None = None
    train_seconds: float | None = None


def run_demo(output_dir: Path, seeds: int = 1, task: str = "extract", steps: int = STEPS) -> list[Run]:
    """
    Run the demo and print its table.

    Writes the AGL adapter with its evidence and card into `output_dir`, the plain one into `output_dir/lora`, further
    seeds into `output_dir/seed-N`, and all figures into `output_dir/results.json`.

    Args:
        output_dir (`Path`):
            Where everything goes.
        seeds (`int`, *optional*, defaults to `1`):
            Number of repetitions.
        task (`str`, *optional*, defaults to `"extract"`):
            Benign task, one of [`agl_trl.miniworld.TASKS`].
        steps (`int`, *optional*, defaults to `400`):
            Optimizer steps of every run.

    Raises:
        `ValueError`: If there is no such task.
        `OSError`: If `output_dir` can't be written.
        [`MissingExtra`]: If scipy is not installed, which the intervals in the cards come from.
    """
    binomial_test()  # told now, not after training
    console = Console()
    tokenizer, train, test, prompts = (
        load_tokenizer(),
        task_dataset(task),
        task_dataset(task, "test"),
        heldout_prompts(),
    )
    write_atomically(output_dir / "results.json", _as_json([]))  # told now if the folder can't be written
    console.print(
        f"Embedded aligned model, benign task [b]{task}[/b], {len(train)} rows; {len(prompts)} held-out prompts."
    )
    aligned_answers, aligned = evaluate("aligned", 0, load_model(), tokenizer, prompts, test)
    runs = [aligned]
    for seed in range(seeds):
        folder = output_dir if seed == 0 else output_dir / f"seed-{seed}"
        plain, plain_seconds = _train(SFTTrainer, SFTConfig, folder / "lora", seed, steps, tokenizer, train)
        lora_answers, lora = evaluate("lora", seed, plain.model, tokenizer, prompts, test)
        ours, seconds = _train(
            AGLSFTTrainer, AGLSFTConfig, folder, seed, steps, tokenizer, train, alignment_dataset=alignment_dataset()
        )
        agl_answers, agl = evaluate("agl", seed, ours.model, tokenizer, prompts, test)

        plain_report = DriftReport.measure(plain.model, ours.statistics)
        report = ours.drift_report()
        for run, trained, run_report in ((lora, plain_seconds, plain_report), (agl, seconds, report)):
            run.train_seconds = trained
            run.relative_drift = run_report.mean_relative_drift
            run.task_gain_retained = (aligned.task_nll - run.task_nll) / (aligned.task_nll - lora.task_nll)
        runs += [lora, agl]

        for trainer, answers, its_report in ((plain, lora_answers, plain_report), (ours, agl_answers, report)):
            models, questions = BaseAndTuned(trainer.model), list(prompts["prompt"])
            probes = probe(models, tokenizer, questions, aligned_answers.texts, torch.tensor(prompts["unsafe"]))
            its_report.behaviour = compare(prompts, aligned_answers, answers, probes, StringJudge())
            its_report.behaviour.metadata["prompts"] = {
                "name": MINIWORLD,
                "license": "apache-2.0",
                "count": len(prompts),
            }
        _save(folder, plain, ours, plain_report, report)
        write_atomically(output_dir / "results.json", _as_json(runs))
    console.print(_table(runs))
    console.print(
        f"Adapters, evidence and model card: [b]{output_dir}[/b]; picture: {output_dir / FOLDER / PICTURE_FILE}"
    )
    return runs


class _Bar(TrainerCallback):
    """One progress bar per training run, with the loss, instead of a line per log."""

    def __init__(self, desc: str):
        self.desc = desc

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc=self.desc, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def _train(trainer_class, config_class, folder: Path, seed: int, steps: int, tokenizer, train: Dataset, **kwargs: Any):
    """Train one adapter on the embedded aligned model; the trainer, and the seconds `train()` took, statistics included."""
    name = "AGL" if trainer_class is AGLSFTTrainer else "Plain LoRA"
    trainer = trainer_class(
        model=str(checkpoint_path("aligned")),
        args=config_class(str(folder), seed=seed, max_steps=steps, model_init_kwargs={"dtype": "float32"}, **TRAINING),
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA),
        callbacks=[_Bar(f"{name}, seed {seed}")],
        **kwargs,
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    return trainer, time.perf_counter() - start


def evaluate(
    name: str,
    seed: int,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    test: Dataset,
    progress: bool = True,
) -> tuple[Answers, Run]:
    """Answers of one model to the held-out prompts, and its line of the results."""
    options: dict[str, Any] = dict(max_new_tokens=MAX_NEW_TOKENS, batch_size=256, progress=progress)
    answers = answer_prompts(model, tokenizer, prompts, desc=f"Asking {name}", **options)
    unsafe, unseen = torch.tensor(prompts["unsafe"]), torch.tensor(prompts["unseen"])
    written = generate_answers(model, tokenizer, list(test["prompt"]), desc=f"Task, {name}", **options)
    expected = [completion[0]["content"] for completion in test["completion"]]

    def rate(chosen: torch.Tensor) -> float:
        return answers.refused[chosen].float().mean().item()

    return answers, Run(
        name=name,
        seed=seed,
        refusal_unsafe=rate(unsafe & ~unseen),
        refusal_unseen=rate(unsafe & unseen),
        over_refusal=rate(~unsafe),
        unsafe_nll=answers.nll[unsafe & ~unseen].mean().item(),
        task_nll=answer_nll(model, tokenizer, test, batch_size=64).mean().item(),
        task_exact=sum(a == b for a, b in zip(written, expected, strict=True)) / len(expected),
    )


def _save(
    folder: Path, plain: SFTTrainer, ours: AGLSFTTrainer, plain_report: DriftReport, report: DriftReport
) -> None:
    plain.save_model()
    plain_report.adapter_sha256 = sha256(folder / "lora" / ADAPTER_FILE)
    plain_report.save_pretrained(folder / "lora")
    assert plain_report.behaviour is not None
    plot_drift(plain_report, folder / "lora" / FOLDER / PICTURE_FILE, name="plain LoRA")
    ours.save_model()
    assert ours.align_guard is not None and ours.statistics is not None
    save_evidence(folder, ours.statistics, ours.align_guard.references, report, ours.align_guard.layers)
    plot_drift(report, folder / FOLDER / PICTURE_FILE, name="AGL", others={"plain LoRA": plain_report.behaviour})
    ours.create_model_card(model_name=f"{MINIWORLD}-agl")
    write_card(folder / "README.md", f"{MINIWORLD}-agl", report)


def _as_json(runs: list[Run]) -> bytes:
    return (json.dumps({"runs": [asdict(run) for run in runs]}, indent=1) + "\n").encode()


COLUMNS = {
    "refusal_unsafe": ("refuses\nunsafe", "{:.1%}"),
    "refusal_unseen": ("unseen\ncateg.", "{:.1%}"),
    "over_refusal": ("over-\nrefusal", "{:.1%}"),
    "unsafe_nll": ("refusal\nNLL", "{:.3f}"),
    "task_nll": ("task\nNLL", "{:.4f}"),
    "task_exact": ("exact\nmatch", "{:.1%}"),
    "task_gain_retained": ("gain\nkept", "{:.4f}"),
    "relative_drift": ("rel.\ndrift", "{:.1e}"),
    "train_seconds": ("train\nsec.", "{:.1f}"),
}
assert list(COLUMNS) == [field.name for field in fields(Run)][2:]


def _table(runs: list[Run]) -> Table:
    """A line per model, narrow enough for 80 columns; with several seeds the median, and smallest and largest below it."""
    several = max(run.seed for run in runs) > 0
    caption = "median, smallest and largest over seeds" if several else None
    table = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("model", no_wrap=True)
    for title, _ in COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for name, title in {"aligned": "aligned", "lora": "plain LoRA", "agl": "AGL LoRA"}.items():
        lines: list[list[str]] = [[title, "", ""]]
        for key, (_, form) in COLUMNS.items():
            values = [getattr(run, key) for run in runs if run.name == name and getattr(run, key) is not None]
            spread = [stats.median(values), min(values), max(values)] if values else []
            lines.append([form.format(value) for value in spread] or ["–", "", ""])
        count = 3 if several and name != "aligned" else 1
        table.add_row(*("\n".join(cell[:count]) for cell in lines), end_section=several)
    return table
