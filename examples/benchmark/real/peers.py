"""
Peers that did best on the embedded world, on a real model: what a trainer is given beside its rows. Their equations and what is
inferred in them stand in `safegrad.py` and `guardspace.py` of the folder above, beside `lapt.py`, whose trainer is taken as it is.
"""

from typing import Any

import torch
from transformers import TrainerCallback
from trl import SFTTrainer

from agl_trl import estimate_fisher
from agl_trl.data.alignment import tokenize_row
from agl_trl.fisher.protected_rows import COMPLY, REFUSE
from agl_trl.fisher.reference_answers import ReferenceAnswers

from ..guardspace import RANK, NullSpace, leading
from ..safegrad import Surgery


LONGEST = 256  # tokens of a protected row in what is no AGL: longer ones lose their end


def safegrad(trainer: SFTTrainer, protected: list[dict[str, Any]], seed: int) -> TrainerCallback:
    """Surgery and the gradient of the KL with ρ = 0.1, the best of three on the embedded world, on 16 rows a step."""
    tokenizer = trainer.processing_class
    rows = [tokenize_row(row, tokenizer, LONGEST) for row in protected]
    kinds = [REFUSE if row["unsafe"] else COMPLY for row in protected]
    with trainer.model.disable_adapter():
        references = ReferenceAnswers.measure(trainer.model, tokenizer, rows, kinds, progress=False)
    return Surgery(references, 0.1, seed)


def guardspace(trainer: SFTTrainer, protected: list[dict[str, Any]], seed: int) -> TrainerCallback:
    """95 % of the input covariance of the unsafe rows."""
    options = dict(rank=RANK, dtype=torch.float32, seed=seed, progress=False)
    statistics = estimate_fisher(trainer.model, protected, trainer.processing_class, **options)
    return NullSpace({name: leading(statistics.inputs[key], 0.95) for name, key in statistics.input_of.items()})
