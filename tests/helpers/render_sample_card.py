"""
The sample of an adapter's card, from made-up figures. `python -m tests.helpers.render_sample_card` writes `model_cards/sample.md`
anew after a change of the templates.
"""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from agl_trl.drift.report import DriftReport
from agl_trl.evaluation.behaviour import Behaviour
from agl_trl.hub.model_card import write_card
from agl_trl.objective.alignguard import Coefficients


SAMPLE = Path(__file__).parents[2] / "model_cards" / "sample.md"
NAME = "Sample card, in which all figures are made up"
# As TRL writes it, with versions that stay.
TRL_CARD = """---
base_model: org/base-model
datasets: org/train-set
library_name: transformers
model_name: sample
tags:
- generated_from_trainer
- trl
- sft
- alignguard-lora
licence: license
---

# Model Card for sample

This model is a fine-tuned version of [org/base-model](https://huggingface.co/org/base-model).

## Training procedure

\x20


This model was trained with SFT.

### Framework versions

- TRL: 1.16.0

## Citations



Cite TRL as:
\x20\x20\x20\x20
```bibtex
@software{vonwerra2020trl,
  title = {{TRL: Transformers Reinforcement Learning}}
}
```
"""


def made_up_behaviour(refused_base: int = 38, refused_tuned: int = 36) -> Behaviour:
    """Forty unsafe prompts of two categories, of which so many are refused, and twenty safe ones, of which one is."""
    unsafe, index = torch.arange(60) < 40, torch.arange(60)
    return Behaviour(
        categories=["fraud"] * 25 + ["weapons"] * 15 + ["look-alike"] * 20,
        unsafe=unsafe,
        refused_base=(index < refused_base) | (index == 59),
        refused_tuned=(index < refused_tuned) | (index == 59),
        nll_base=torch.full((60,), torch.nan),
        nll_tuned=torch.full((60,), torch.nan),
        kl_first_tokens=torch.where(unsafe, 0.03125, 0.125),
        margin_base=torch.full((60,), torch.nan),
        margin_tuned=torch.full((60,), torch.nan),
        hidden_drift=torch.tensor([0.0, 0.01]),
        direction_cosine=torch.tensor([1.0, 0.99]),
        metadata={
            "judge": {"name": "refusal-strings", "version": "1"},
            "verdicts": {
                "base": {"uncertain": 3, "cut_off": 0, "while_reasoning": 0},
                "tuned": {"uncertain": 6, "cut_off": 3, "while_reasoning": 0},
            },
            "decoding": "greedy",
            "kl_tokens": 8,
            "prompts_sha256": "0123456789abcdef" * 4,
            "prompts": {"name": "driftcaps", "license": "cc-by-4.0", "count": 60},
        },
    )


def made_up_report(behaviour: Behaviour | None = None, base_model: str | None = "org/base-model") -> DriftReport:
    """A report of two layers, as a trainer makes it."""
    drift = torch.tensor([2.0**-12, 3 * 2.0**-12])
    return DriftReport(
        layers=["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"],
        relative_drift=drift,
        alignment_energy=drift / 4,
        task_energy=drift * 3 / 4,
        overlap=torch.tensor([0.5, 0.5]),
        history={"step": torch.tensor([100.0, 200.0])},
        behaviour=behaviour,
        global_step=200,
        metadata={
            "base_model": {"name": base_model, "revision": "0123456789abcdef0123456789abcdef01234567", "config": {}},
            "fisher": {"shrinkage": 1.0, "num_tokens": 12345, "seed": 0},
            "coefficients": {
                "variant": "kfac",
                **asdict(Coefficients(alignment=0.1, task=0.1)),
                "drift_budget": 0.001,
            },
        },
    )


def held_report(behaviour: Behaviour | None = None) -> DriftReport:
    """The same of a run under a KL budget, which protected another behaviour too."""
    report = made_up_report(behaviour)
    report.metadata["coefficients"] = {
        "variant": "kfac",
        **asdict(Coefficients(alignment=0.0, task=0.0)),
        "kl_budget": 0.02,
        "trust_radius": 2.0,
        "anchor_coef": 0.6,
        "anchor_every": 2,
    }
    alignment = {"budget": 0.02, "kl": 0.0195, "kl_first_tokens": 0.025, "rows": 128}
    report.metadata["protected"] = {
        "behaviours": {
            "alignment": {**alignment, "kinds": {"comply": 0.018, "refuse": 0.021}},
            "text": {"budget": 0.01, "kl": 0.004, "kl_first_tokens": 0.006, "rows": 64, "kinds": {}},
        },
        "scale": 0.9,
    }
    return report


def render() -> str:
    """The sample as it should be."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "README.md"
        path.write_text(TRL_CARD, encoding="utf-8")
        write_card(path, NAME, held_report(made_up_behaviour()), repo_id="user/sample")
        return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    SAMPLE.write_text(render(), encoding="utf-8")
