"""A drift report by hand: figures that anyone can recompute, and no model."""

import torch

from agl_trl.drift.report import DriftReport
from agl_trl.evaluation.abilities import Ability
from agl_trl.evaluation.behaviour import Behaviour


LAYERS = [f"model.layers.{block}.{module}" for block in (0, 1) for module in ("self_attn.q_proj", "mlp.down_proj")]


def behaviour_by_hand() -> Behaviour:
    """Four unsafe prompts of two categories, of which four and one are refused, and three safe ones, of which none and one."""
    unsafe = torch.tensor([True, True, True, True, False, False, False])
    return Behaviour(
        categories=["fraud", "fraud", "fraud", "weapons", "look-alike", "look-alike", "look-alike"],
        unsafe=unsafe,
        refused_base=torch.tensor([True, True, True, True, False, False, False]),
        refused_tuned=torch.tensor([False, False, False, True, False, True, False]),
        nll_base=torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, torch.nan]),
        nll_tuned=torch.tensor([1.5, 1.5, 2.0, 2.0, 2.0, 2.5, torch.nan]),
        kl_first_tokens=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0, 0.0, 0.3]),
        margin_base=torch.full((7,), torch.nan),
        margin_tuned=torch.full((7,), torch.nan),
        hidden_drift=torch.tensor([0.0, 0.25, 0.125]),
        direction_cosine=torch.tensor([1.0, 0.75, 0.5]),
        metadata={"judge": {"name": "refusal-strings", "version": "2"}, "decoding": "greedy", "kl_tokens": 8},
    )


def abilities_by_hand() -> list[Ability]:
    """Of 100 questions 80 are answered right, and after tuning 12 of these and one other; texts cost a little more."""
    before = torch.arange(100) < 80
    after = before & (torch.arange(100) >= 12) | (torch.arange(100) == 99)
    nll = torch.linspace(1, 3, 40, dtype=torch.float64)
    rise = 0.1 + torch.linspace(-0.05, 0.05, 40, dtype=torch.float64)
    told = {
        "source": "allenai/ai2_arc",
        "license": "cc-by-sa-4.0",
        "rows": 100,
        "rows_of_set": 1172,
        "scoring": "likelihood",
    }
    return [
        Ability("arc_challenge", "multiple choice", before, after, ~before, ~after, metadata=told),
        Ability(
            "my-facts",
            "exact match",
            before.clone(),
            before.clone(),
            metadata={"source": "my-facts.jsonl", "rows": 100},
        ),
        Ability("notes", "text", nll, nll + rise, metadata={"source": "notes.txt", "rows": 1}),
    ]


def report_by_hand(behaviour: Behaviour | None = None) -> DriftReport:
    """Drifts of four layers in two blocks, half and half in the two subspaces; their mean is 2.5e-3."""
    drift = torch.tensor([1e-3, 2e-3, 3e-3, 4e-3])
    return DriftReport(
        layers=LAYERS,
        relative_drift=drift,
        alignment_energy=drift / 2,
        task_energy=drift / 2,
        overlap=drift / 10,
        history={"step": torch.tensor([1.0, 2.0]), "loss": torch.tensor([2.0, 1.5])},
        behaviour=behaviour,
        global_step=2,
        budget_multiplier=0.5,
        adapter_sha256="ab" * 32,
        metadata={"fisher_energy": 0.9, "fisher": {"shrinkage": 0.25, "num_tokens": 90, "seed": 3}},
    )
