"""How cost and size of the protection grow with rank, depth and width: exponents of power laws fitted on a log scale."""

from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from agl_trl import AlignGuardConfig, estimate_fisher
from agl_trl.miniworld import alignment_dataset, load_tokenizer
from agl_trl.modeling.lora import adapted_layers
from agl_trl.trainer.regularizer import Regularizer

from .fisher import saved_bytes
from .shapes import llama
from .turns import work_seconds


BASE = dict(rank=16, layers=4, width=512)
SWEEPS = {"rank": (4, 8, 16, 32, 64), "layers": (2, 4, 8, 16), "width": (256, 512, 1024, 2048)}


def regularizer_of(rank: int, layers: int, width: int, rows: int = 8, **options: Any) -> tuple[Regularizer, Any]:
    """Regularizer of a Llama with random weights and statistics of a few rows; its adapter has been moved. Also the statistics."""
    shape = dict(vocab_size=2048, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers)
    model = get_peft_model(
        llama(**shape, num_attention_heads=8, num_key_value_heads=4), LoraConfig(r=rank, target_modules="all-linear")
    )
    statistics = estimate_fisher(model, alignment_dataset(), load_tokenizer(), num_samples=rows, progress=False)
    adapted = adapted_layers(model)
    with torch.no_grad():
        for layer in adapted:
            layer.parameters()[1].normal_(std=0.01)
    config = AlignGuardConfig(**(options or dict(alignment_coef=3.0)))
    return Regularizer(config, adapted, statistics), statistics


def growth(repeats: int, sweeps: dict[str, tuple[int, ...]] = SWEEPS) -> list[dict[str, Any]]:
    """Per quantity and per rank, layers, width the fitted exponent: 1 is proportional, 0 does not grow."""
    lines = []
    for axis, values in sweeps.items():
        found: dict[str, list[float]] = {"penalty, seconds": [], "statistics, bytes": [], "adapter, bytes": []}
        for value in values:
            regularizer, statistics = regularizer_of(**BASE | {axis: value})
            found["penalty, seconds"].append(work_seconds(regularizer, repeats))
            found["statistics, bytes"].append(saved_bytes(statistics))
            found["adapter, bytes"].append(sum(p.numel() * p.element_size() for p in regularizer.parameters))
        exponents = {name: float(np.polyfit(np.log(values), np.log(y), 1)[0]) for name, y in found.items()}
        lines.append({"grows with": f"{axis} {values[0]} to {values[-1]}", **exponents})
    return lines
