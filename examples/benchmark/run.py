"""One run: train one method on one protocol with one seed, evaluate it, and say what it kept and what it cost.

Apart from `__main__`, which processes that are spawned cannot import.
"""

import shutil
import time
import warnings
from pathlib import Path

import torch
from datasets import disable_progress_bars
from transformers.utils import logging

from agl_trl import FisherStatistics
from agl_trl.drift.report import DriftReport
from agl_trl.experiments.demo import evaluate
from agl_trl.miniworld import heldout_prompts, load_model, load_tokenizer

from .lookahead import prefixed
from .methods import METHODS
from .protocols import PROTOCOLS, attack, test_rows, training_rows
from .setting import PUBLISHED, Setting, reference_answers


ALIGNED = "aligned"  # stands for a method in the results


def start_worker() -> None:
    """One thread and no noise."""
    quiet()
    torch.set_num_threads(1)


def run_one(pairs: tuple[tuple[str, str], ...], seed: int, steps: int, folder: Path) -> list[dict]:
    """
    Train once and evaluate, in a process of its own or its peak of memory is another's.

    Args:
        pairs (`tuple[tuple[str, str], ...]`):
            Protocols with methods that share this training: protocols that differ in what follows it, of which the one that
            changes the adapter stands last, and methods that differ in how the model is steered at inference.
        seed (`int`):
            Seed of the run.
        steps (`int`):
            Optimizer steps.
        folder (`Path`):
            Where the published statistics are.

    Returns:
        `list[dict]`: the line of the results of every pair.
    """
    (protocol, method), *_ = pairs
    tokenizer, prompts, rule = load_tokenizer(), heldout_prompts(), PROTOCOLS[protocol]
    scratch = folder / "scratch" / f"{protocol}-{method}-{seed}"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(folder / PUBLISHED, scratch / PUBLISHED)
    train = training_rows(rule, seed, steps * 16)
    reset_peak()
    setting = Setting(scratch, seed, steps, tokenizer, train, rule.preferences, len(rule.tasks) > 1)
    trainer = METHODS[method].make(setting)
    start, busy = time.perf_counter(), time.process_time()
    trainer.train()
    # Beside other work the clock on the wall says nothing; of one thread the seconds in which it ran do.
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resident("VmHWM")
    # A budget is kept in the metric it was set in, which the yardstick need not be.
    budget = getattr(trainer.args, "drift_budget", None)
    kept = None if budget is None else trainer.drift_report().mean_relative_drift <= budget
    test = test_rows(rule)
    expected = test.map(prefixed) if METHODS[method].prefixed else test
    references = reference_answers(load_model(), tokenizer, seed)
    yardstick = FisherStatistics.from_pretrained(folder / PUBLISHED)
    lines, attacked = [], False
    for protocol, method in pairs:
        if PROTOCOLS[protocol].attack and not attacked:
            attack(trainer, rule.tasks[0], seed)
            attacked = True
        with METHODS[method].steer(trainer.model, setting):
            _, run = evaluate(method, seed, trainer.model, tokenizer, prompts, expected, progress=False)
            with torch.no_grad():
                kl = references.kl(trainer.model)
        run.relative_drift = DriftReport.measure(trainer.model, yardstick).mean_relative_drift
        run.train_seconds = seconds
        line = {
            "protocol": protocol,
            "steps": steps,
            "run": vars(run),
            "budget_kept": kept,
            "kl": kl[:, 0].mean().item(),
            "kl_budget": getattr(trainer.args, "kl_budget", None),
            "peak_bytes": peak,
            "cpu_seconds": busy,
        }
        lines.append(line)
    shutil.rmtree(scratch, ignore_errors=True)
    return lines


def aligned(protocol: str) -> dict:
    """The line of the results of the aligned model, before any training."""
    test = test_rows(PROTOCOLS[protocol])
    _, run = evaluate(ALIGNED, 0, load_model(), load_tokenizer(), heldout_prompts(), test, progress=False)
    return {"protocol": protocol, "steps": 0, "run": vars(run)}


def reset_peak() -> None:
    """Start the peak of this process's resident memory from here on (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """Bytes of this process's resident memory: its peak (`"VmHWM"`) or what it holds now (`"VmRSS"`)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(field))


def quiet() -> None:
    """Nothing beside the bar of the runs."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
