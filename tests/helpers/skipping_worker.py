"""
Statistics of plain models with layers that not every process reaches; started by `accelerate launch` from the tests:

    accelerate launch --config_file ddp.yaml -m tests.helpers.skipping_worker OUTPUT_DIR

Every process saves what it got to `OUTPUT_DIR/MODEL-RANK`.
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from agl_trl import FisherStatistics, estimate_fisher
from tests.helpers.models import byte_tokenizer, chat_rows, tiny_model


class Partial(torch.nn.Module):
    """An MLP beside an expert that reads the same input, in the second process alone, and before it."""

    def __init__(self, mlp: torch.nn.Module):
        super().__init__()
        self.expert, self.mlp = torch.nn.Linear(32, 32), mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if PartialState().process_index == 1:
            self.expert(x)
        return self.mlp(x)


def statistics_of(name: str) -> FisherStatistics:
    if name == "mamba":
        model = tiny_model("mamba")
    else:
        model = tiny_model()
        model.model.layers[1].mlp = Partial(model.model.layers[1].mlp)
    rows = chat_rows(11, "please do bad thing", "Sorry, no {}.")
    options = dict(rank=4, shrinkage=0.5, batch_size=2, dtype=torch.float32)
    return estimate_fisher(model, rows, byte_tokenizer(), progress=False, **options)


if __name__ == "__main__":
    state = PartialState(cpu=True)
    for name in ("mamba", "partial"):
        statistics_of(name).save_pretrained(Path(sys.argv[1]) / f"{name}-{state.process_index}")
    state.destroy_process_group()
