"""Peak memory of one trainer or one Fisher pass, each measured in a process of its own."""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model

from agl_trl import estimate_fisher
from agl_trl.data import batches, select_rows, tokenize_row
from agl_trl.miniworld import load_tokenizer

from ..run import quiet, reset_peak, resident
from .shapes import SHAPES, lora_of, model_of, rows_of
from .turns import build


PASSES = {"Fisher, δ = 1": 1.0, "Fisher, δ = 0.1": 0.1}
PEER = "alignment-risk"


def apart(name: str, shape: str, kind: str, size: int) -> dict[str, float] | None:
    """What [`main`] prints, from a fresh process; `None` where the peer is not installed."""
    if name == PEER and importlib.util.find_spec("alignment_risk") is None:
        return None
    command = [sys.executable, "-m", "examples.benchmark.overhead.memory", name, shape, kind, str(size)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"'{name}' failed: {(done.stderr.strip().splitlines() or ['it was killed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(name: str, shape: str, kind: str, size: Annotated[int, typer.Argument(help="Steps or rows.")]) -> None:
    """Print the peak, what of it came on top of the loaded model, and the seconds, of a variant or a Fisher pass."""
    quiet()
    rule = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        if name in PASSES or name == PEER:
            model = get_peft_model(model_of(rule), LoraConfig(**lora_of(rule)))
            rows = rows_of(rule, rows=size)
            job = lambda: fisher_pass(name, model, rows, rule.length, rule.batch)  # noqa: E731
        else:
            job = build(name, rule, kind, size, folder).train
        before = _reset(rule.accelerator)
        start = time.perf_counter()
        job()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if rule.accelerator else resident("VmHWM")
    print(json.dumps({"peak": peak, "extra": peak - before, "seconds": seconds}))


def fisher_pass(name: str, model, rows, length: int, batch: int) -> Any:
    """Statistics of the rows, with ours or with `alignment-risk`, whose samples are rows and whose parameters are LoRA's."""
    tokenizer = load_tokenizer()
    if name != PEER:
        options = dict(damping=PASSES[name], num_samples=None, batch_size=batch, max_length=length, progress=False)
        return estimate_fisher(model, rows, tokenizer, **options)
    from alignment_risk import FisherConfig, FisherSubspaceAnalyzer

    tokenized = [tokenize_row(row, tokenizer, length) for row in select_rows(rows, None, 0)]

    def loss(model, batch):
        labels = batch.input_ids.masked_fill(~batch.token_mask.bool(), -100)
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss

    config = FisherConfig(max_samples=len(rows), max_parameters=10**12, device=str(model.device))
    single = list(batches(tokenized, 1, tokenizer.pad_token_id, model.device))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return FisherSubspaceAnalyzer(config).analyze(model, single, loss, names)


def _reset(accelerator: bool) -> int:
    """Start the peak from here on; returns the memory held now."""
    if accelerator:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    reset_peak()
    return resident("VmRSS")


if __name__ == "__main__":
    typer.run(main)
