"""Peak memory of one trainer or one Fisher pass, each measured in a process of its own."""

import json
import subprocess
import sys
import tempfile
import time
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model

from agl_trl import estimate_fisher
from agl_trl.data import batches, select_rows, tokenize_row
from agl_trl.lora import linear_layers
from agl_trl.miniworld import load_tokenizer

from ..run import quiet, reset_peak, resident
from .shapes import SHAPES, Shape, lora_of, model_of, rows_of
from .turns import build


PASSES = {"Fisher, δ = 1": 1.0, "Fisher, δ = 0.1": 0.1}
# Which parameters `alignment-risk` takes its Fisher of: those of the adapter, or the weights that ours is about.
PEERS = {"alignment-risk, adapter": False, "alignment-risk, weights": True}


def apart(name: str, shape: str, kind: str, size: int) -> dict[str, float]:
    """What [`main`] prints, from a fresh process."""
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
        if name in PASSES or name in PEERS:
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
    """Statistics of the rows, with ours or with `alignment-risk`, whose samples are rows."""
    tokenizer = load_tokenizer()
    if name in PASSES:
        options = dict(damping=PASSES[name], num_samples=None, batch_size=batch, max_length=length, progress=False)
        return estimate_fisher(model, rows, tokenizer, **options)
    from alignment_risk import FisherConfig, FisherSubspaceAnalyzer

    tokenized = [tokenize_row(row, tokenizer, length) for row in select_rows(rows, None, 0)]

    config = FisherConfig(max_samples=len(rows), max_parameters=10**12, device=str(model.device))
    single = [{"input_ids": b.input_ids} for b in batches(tokenized, 1, tokenizer.pad_token_id, model.device)]
    names = peer_parameters(name, model)
    return FisherSubspaceAnalyzer(config).analyze(
        model, single, lambda m, b: m(**b, labels=b["input_ids"]).loss, names
    )


def peer_parameters(name: str, model: PeftModel) -> list[str]:
    """Names of the parameters that the peer takes gradients of, which alone require them afterwards."""
    weights = {id(layer.get_base_layer().weight) for layer in linear_layers(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in weights if PEERS[name] else parameter.requires_grad)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def peer_bytes(name: str, shape: Shape, rows: int) -> int:
    """What the peer holds at least: a gradient of every row, once in a list and once as a matrix."""
    model = get_peft_model(model_of(shape), LoraConfig(**lora_of(shape)))
    names = set(peer_parameters(name, model))
    return 2 * 4 * rows * sum(parameter.numel() for key, parameter in model.named_parameters() if key in names)


def _reset(accelerator: bool) -> int:
    """Start the peak from here on; returns the memory held now."""
    if accelerator:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    reset_peak()
    return resident("VmRSS")


if __name__ == "__main__":
    typer.run(main)
