"""A report with fixed, made-up figures; `python -m tests.sample_report` writes the sample card from it."""

from pathlib import Path

import torch

from agl_trl import DriftReport
from agl_trl.comparison import Behaviour
from agl_trl.model_card import attach_card


SAMPLE = Path(__file__).parent.parent / "model_cards" / "sample.md"
COEFFICIENTS = {
    "variant": "kfac",
    **dict(alignment=0.0, task=0.0, task_metric="rest", task_subspace="complement", collision=0.0, alpha=0.5),
    **dict(beta=4.0, threshold=1.0, width=0.25, rows=None, fisher_energy=0.9, drift_budget=3e-3),
}


def sample_report(
    name: str | None = "alice/aligned-0.6b", categories: tuple[str, ...] = ("fraud", "weapons", "safe")
) -> DriftReport:
    """Two layers and 60 prompts: 40 unsafe (38 refused after, 40 before), 20 safe (1 refused after)."""
    unsafe = torch.arange(60) < 40
    refused_tuned = unsafe & (torch.arange(60) >= 2)
    refused_tuned[-1] = True
    behaviour = Behaviour(
        categories=[categories[0]] * 20 + [categories[1]] * 20 + [categories[2]] * 20,
        unsafe=unsafe,
        refused_base=unsafe.clone(),
        refused_tuned=refused_tuned,
        nll_base=torch.full((60,), 0.12),
        nll_tuned=torch.full((60,), 0.13),
        kl_first_tokens=torch.linspace(0, 0.1, 60),
        margin_base=torch.full((60,), 5.0),
        margin_tuned=torch.full((60,), 4.5),
        hidden_drift=torch.linspace(0, 0.02, 5),
        direction_cosine=torch.linspace(1, 0.95, 5),
        metadata={
            "judge": {"name": "refusal-strings", "version": "2"},
            **dict(decoding="greedy", kl_tokens=8, prompts_sha256="0123456789abcdef" * 4),
            "prompts": {"name": "driftcaps", "license": "apache-2.0", "count": 60},
        },
    )
    return DriftReport(
        layers=["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"],
        relative_drift=torch.tensor([0.002, 0.004]),
        alignment_energy=torch.tensor([0.0001, 0.0002]),
        task_energy=torch.tensor([0.0019, 0.0038]),
        overlap=torch.tensor([1e-6, 2e-6]),
        behaviour=behaviour,
        global_step=200,
        adapter_sha256="ab" * 32,
        metadata={
            "base_model": {"name": name, "revision": None, "config": {}},
            "fisher": {"damping": 1.0, "num_tokens": 12345, "seed": 0},
            "coefficients": COEFFICIENTS,
        },
    )


def write_sample(path: Path) -> None:
    path.unlink(missing_ok=True)
    attach_card(path, "A sample card with made-up figures", sample_report(), repo_id="alice/aligned-0.6b-agl")


if __name__ == "__main__":
    write_sample(SAMPLE)
