"""
The methods that are compared: what each changes in an otherwise equal run, and what data it needs.

A method is a function from a [`Setting`] to a trainer. Baselines that are not part of the package are written out here.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from trl import DPOTrainer, SFTConfig, SFTTrainer

from agl_trl import AGLSFTConfig, AGLSFTTrainer, FisherStatistics
from agl_trl.data.alignment import batches, select_rows, tokenize_row
from agl_trl.experiments.demo import LORA
from agl_trl.fisher.reference_answers import ReferenceAnswers
from agl_trl.miniworld import alignment_dataset, load_model
from agl_trl.modeling.lora import base_weight, linear_layers
from agl_trl.objective.covariance import LowRankCovariance
from agl_trl.trainer.anchor import Anchor

from .alphasteer import alphasteer
from .asft import asft
from .guardspace import guardspace
from .ideas import layer_importance, proximal, pseudo_replay
from .kl_sft import kl_sft
from .lapt import lapt
from .lookahead import lookahead, real, virtual
from .lox import lox
from .orthogonal import oft, osf
from .projection import projection
from .safe_lora import safe_lora
from .safegrad import safegrad
from .salora import salora
from .scans import scans
from .screening import screening
from .setting import (
    Setting,
    batch_nll,
    build,
    common,
    protected_rows,
    published_statistics,
    reference_answers,
)
from .sot import sot
from .splora import splora
from .ssah import ssah
from .star_dss import star_dss


def plain(**changes: Any) -> Callable[[Setting], SFTTrainer]:
    def make(setting: Setting) -> SFTTrainer | DPOTrainer:
        trainer_class, config_class = setting.plain
        return build(trainer_class, config_class(**common(setting, **changes)), setting)

    return make


def agl(**options: Any) -> Callable[[Setting], SFTTrainer]:
    """AGL from published statistics alone: the alignment rows are in the run only where the anchor needs them."""
    options = dict(alignment_coef=3.0) | options

    def make(setting: Setting) -> SFTTrainer | DPOTrainer:
        trainer_class, config_class = setting.agl
        if {"anchor_coef", "variant", "fisher_shrinkage"} & {*options}:
            data = dict(alignment_dataset=alignment_dataset())
            return build(trainer_class, config_class(**common(setting, **options)), setting, **data)
        path = published_statistics(setting.folder)
        return build(trainer_class, config_class(**common(setting, fisher_path=str(path), **options)), setting)

    return make


def kl_budget(budget: float | None = None, **options: Any) -> Callable[[Setting], SFTTrainer]:
    """AGL as it is by default: a budget on the KL on protected rows, of which refusals and look-alikes are in the run."""

    def make(setting: Setting) -> SFTTrainer | DPOTrainer:
        trainer_class, config_class = setting.agl
        args = config_class(**common(setting, kl_budget=budget, **options))
        return build(trainer_class, args, setting, alignment_dataset=alignment_dataset())

    return make


def calibrated(budget: float) -> Callable[[Setting], SFTTrainer]:
    """AGL from published statistics alone: a KL budget that their curve translates into one on the relative drift."""

    def make(setting: Setting) -> SFTTrainer | DPOTrainer:
        trainer_class, config_class = setting.agl
        path = published_statistics(setting.folder)
        return build(trainer_class, config_class(**common(setting, fisher_path=str(path), kl_budget=budget)), setting)

    return make


def l2(coef: float) -> Callable[[Setting], SFTTrainer]:
    """Plain shrinkage `‖ΔW‖²_Frob / ‖W‖²_Frob`: the same penalty with the identity for a metric."""

    def make(setting: Setting) -> SFTTrainer:
        path = published_statistics(setting.folder)
        statistics = FisherStatistics.from_pretrained(path)
        for name, X in statistics.inputs.items():
            ones = torch.ones_like(X.eigenvalues)
            statistics.inputs[name] = LowRankCovariance(X.eigenvectors.float(), ones, torch.ones(()))
        layers = linear_layers(get_peft_model(load_model(), LoraConfig(**LORA)))
        statistics.weight_norm = {name: base_weight(module).norm() for name, module in layers.items()}
        statistics.save_pretrained(path)
        args = AGLSFTConfig(**common(setting, fisher_path=str(path), alignment_coef=coef))
        return build(AGLSFTTrainer, args, setting)

    return make


class ReplayTrainer(SFTTrainer):
    """Safety replay: a few protected rows in every step, as part of the loss."""

    coef, rows_per_step = 0.2, 1

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            return loss
        rows = self.replay_rows
        start = self.state.global_step * self.rows_per_step
        chosen = [rows[(start + i) % len(rows)] for i in range(self.rows_per_step)]
        (batch,) = batches(chosen, len(chosen), self.processing_class.pad_token_id, self.model.device)
        return loss + self.coef * batch_nll(self.model, batch)


def replay(coef: float = 0.2, own: bool = False) -> Callable[[Setting], SFTTrainer]:
    """
    With the given answers, or the model's own: safety data in the style of the model that is trained on it, as in DGR (arXiv
    2602.02136), which has the target model rewrite reasoned refusals. Here it answers the bare request, since no row reasons.
    """

    def make(setting: Setting) -> SFTTrainer:
        trainer = build(ReplayTrainer, SFTConfig(**common(setting)), setting)
        rows, _ = protected_rows(setting.tokenizer, setting.seed, answered=load_model() if own else None)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(setting.seed)).tolist()
        trainer.replay_rows = [rows[i] for i in order]
        trainer.coef = coef
        return trainer

    return make


class KLTrainer(SFTTrainer):
    """KL to the reference model on rows to refuse and to answer, in every step: those that AGL has, mean over rows, weight 1."""

    rows_per_step = 16
    references: ReferenceAnswers

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        anchor = Anchor(self.references, 1, self.rows_per_step, self.args.seed)
        self.accelerator.backward(anchor.kl(self.model, "alignment", self.state.global_step)[0])
        return loss


def kl() -> Callable[[Setting], SFTTrainer]:
    def make(setting: Setting) -> SFTTrainer:
        trainer = build(KLTrainer, SFTConfig(**common(setting)), setting)
        trainer.references = reference_answers(trainer.model, setting.tokenizer, setting.seed)
        return trainer

    return make


class EWCTrainer(SFTTrainer):
    """
    Elastic weight consolidation on the LoRA factors: `λ Σ F_i (θ_i − θ_i⁰)²` with F the squared gradient of the alignment
    rows' likelihood at the start, row by row. With B = 0 at the start only B has a gradient, so only B is held.
    """

    coef = 1e4

    def prepare(self, rows: list[dict[str, Any]]) -> None:
        self.start = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        self.fisher = {n: torch.zeros_like(p) for n, p in self.start.items()}
        tokenized = [tokenize_row(row, self.processing_class) for row in rows]
        self.model.eval()
        for batch in batches(tokenized, 1, self.processing_class.pad_token_id, self.model.device):
            batch_nll(self.model, batch).backward()
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    self.fisher[name] += parameter.grad.square()
            self.model.zero_grad()
        self.model.train()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        moved = [
            (self.fisher[n] * (p - self.start[n]).square()).sum()
            for n, p in self.model.named_parameters()
            if p.requires_grad
        ]
        return loss + self.coef * torch.stack(moved).sum()


def ewc(coef: float) -> Callable[[Setting], SFTTrainer]:
    def make(setting: Setting) -> SFTTrainer:
        trainer = build(EWCTrainer, SFTConfig(**common(setting)), setting)
        trainer.coef = coef
        trainer.prepare(select_rows(alignment_dataset(), None, setting.seed))
        return trainer

    return make


@dataclass(frozen=True)
class Method:
    """
    Args:
        make (`Callable`):
            Builds the trainer.
        family (`str`):
            Methods of one family lie on one curve.
        needs (`str`):
            What data the training run itself holds.
        preferences (`bool`, *optional*, defaults to `False`):
            Whether it can train on preferences too.
        prefixed (`bool`, *optional*, defaults to `False`):
            Whether it teaches to begin every answer with LookAhead's P, which the test then expects.
        steer (`Callable`, *optional*):
            Makes the context in which the trained model is evaluated: hooks that steer it at inference. By default nothing.
    """

    make: Callable[[Setting], SFTTrainer]
    family: str
    needs: str
    preferences: bool = False
    prefixed: bool = False
    steer: Callable[[PeftModel, Setting], AbstractContextManager[None]] = lambda model, setting: nullcontext()


ALL = dict(collision_coef=0.1, collision_rows=32)
NOTHING, STATISTICS, ROWS, PAIR = "nothing", "statistics", "safety rows", "aligned and base weights"
METHODS = {
    "lora": Method(plain(), "plain LoRA", NOTHING, preferences=True),
    "lora-lr-1e-3": Method(plain(learning_rate=1e-3), "plain LoRA", NOTHING),
    "lora-lr-5e-4": Method(plain(learning_rate=5e-4), "plain LoRA", NOTHING),
    "agl-0.3": Method(agl(alignment_coef=0.3), "AGL penalty", STATISTICS),
    "agl-1": Method(agl(alignment_coef=1.0), "AGL penalty", STATISTICS, preferences=True),
    "agl-3": Method(agl(alignment_coef=3.0), "AGL penalty", STATISTICS, preferences=True),
    "agl-10": Method(agl(alignment_coef=10.0), "AGL penalty", STATISTICS, preferences=True),
    "budget-1e-2": Method(agl(alignment_coef=0.0, drift_budget=1e-2), "AGL budget", STATISTICS, preferences=True),
    "budget-3e-3": Method(agl(alignment_coef=0.0, drift_budget=3e-3), "AGL budget", STATISTICS, preferences=True),
    "budget-1e-3": Method(agl(alignment_coef=0.0, drift_budget=1e-3), "AGL budget", STATISTICS, preferences=True),
    "budget-5e-3": Method(agl(alignment_coef=0.0, drift_budget=5e-3), "AGL budget", STATISTICS),
    "budget-3e-3-shrunk": Method(
        agl(alignment_coef=0.0, drift_budget=3e-3, fisher_shrinkage=0.1), "AGL budget, both sides", STATISTICS
    ),
    "budget-3e-3-anchor": Method(
        agl(alignment_coef=0.0, drift_budget=3e-3, anchor_coef=1.0, anchor_every=2), "AGL anchor", ROWS
    ),
    "only-alignment": Method(agl(task_coef=0.0), "one term", STATISTICS),
    "only-task": Method(agl(alignment_coef=0.0, task_coef=3.0), "one term", STATISTICS),
    "only-overlap": Method(
        agl(alignment_coef=0.0, collision_coef=0.1, collision_alpha=1.0, collision_rows=32), "one term", STATISTICS
    ),
    "only-geodesic": Method(agl(alignment_coef=0.0, collision_coef=0.1, collision_alpha=0.0), "one term", STATISTICS),
    "all": Method(agl(**ALL), "all terms", STATISTICS),
    "all-but-alignment": Method(agl(alignment_coef=0.0, task_coef=3.0, **ALL), "all terms", STATISTICS),
    "all-but-task": Method(agl(task_coef=0.0, **ALL), "all terms", STATISTICS),
    "all-but-overlap": Method(agl(collision_coef=0.1, collision_alpha=0.0), "all terms", STATISTICS),
    "all-but-geodesic": Method(
        agl(collision_coef=0.1, collision_alpha=1.0, collision_rows=32), "all terms", STATISTICS
    ),
    "paper": Method(agl(variant="paper"), "as published", STATISTICS),
    "shrinkage-0.1": Method(agl(fisher_shrinkage=0.1), "AGL, both sides", STATISTICS),
    "l2-1": Method(l2(1.0), "L2", NOTHING),
    "l2-10": Method(l2(10.0), "L2", NOTHING),
    "ewc-1e2": Method(ewc(1e2), "EWC", STATISTICS),
    "ewc-1e4": Method(ewc(1e4), "EWC", STATISTICS),
    "anchor": Method(agl(alignment_coef=0.3, anchor_coef=1.0, anchor_every=2), "AGL anchor", ROWS, preferences=True),
    "anchor-alone": Method(agl(alignment_coef=0.0, anchor_coef=1.0, anchor_every=2), "AGL anchor", ROWS),
    "importance-3": Method(layer_importance(3.0), "layer importance", STATISTICS),
    "proximal-10": Method(proximal(10.0), "proximal step", STATISTICS),
    "pseudo-replay": Method(
        pseudo_replay(alignment_coef=0.0, anchor_coef=1.0, anchor_every=2), "pseudo-replay", NOTHING
    ),
    "replay": Method(replay(), "replay", ROWS),
    "replay-1": Method(replay(1.0), "replay", ROWS),
    "kl": Method(kl(), "KL", ROWS),
    "agl": Method(kl_budget(), "AGL", ROWS, preferences=True),
    "agl-kl-0.005": Method(kl_budget(0.005), "AGL", ROWS, preferences=True),
    "agl-kl-0.05": Method(kl_budget(0.05), "AGL", ROWS, preferences=True),
    "agl-radius4": Method(kl_budget(0.02, trust_radius=4.0), "AGL, twice the trust region", ROWS),
    "agl-no-region": Method(kl_budget(0.02, trust_radius=None), "AGL, anchor and projection, no trust region", ROWS),
    "agl-no-anchor": Method(kl_budget(0.02, anchor_coef=0.0), "AGL, trust region and projection", ROWS),
    "agl-statistics": Method(calibrated(0.02), "AGL, statistics alone", STATISTICS, preferences=True),
    "safe-lora": Method(safe_lora(), "Safe LoRA", PAIR),
    "safe-lora-exact": Method(safe_lora(energy=0.5), "Safe LoRA, exact", PAIR),
    "salora": Method(salora(), "SaLoRA", ROWS),
    "splora": Method(splora(), "SPLoRA", PAIR),
    "splora-cosine": Method(splora(score="cosine"), "SPLoRA, by cosine", PAIR),
    "lox": Method(lox(), "LoX", PAIR),
    "lox-full": Method(lox(rank=0, coef=1.0), "LoX", PAIR),
    "asft": Method(asft(), "AsFT", PAIR),
    "spf": Method(projection("spf"), "SPF", ROWS, preferences=True),
    "ogpsa": Method(projection("ogpsa"), "OGPSA", ROWS, preferences=True),
    "lookahead-real": Method(lookahead(real), "LookAhead", NOTHING),
    "lookahead-virtual": Method(lookahead(virtual), "LookAhead, virtual", NOTHING, prefixed=True),
    # Training-time methods of the field since.
    "safegrad": Method(safegrad(), "SafeGrad", ROWS),
    "safegrad-1": Method(safegrad(1.0), "SafeGrad", ROWS),
    "ssah-0.075": Method(ssah(0.075), "SSAH", ROWS),
    "ssah-0.3": Method(ssah(0.3), "SSAH", ROWS),
    "kl-sft-0.1": Method(kl_sft(0.1), "KL on the task's rows", NOTHING),
    "kl-sft-1": Method(kl_sft(1.0), "KL on the task's rows", NOTHING),
    "dft-kl-0.1": Method(kl_sft(0.1, dft=True), "ASFT", NOTHING),
    "oft": Method(oft(), "OFT", NOTHING),
    "osf-0.5": Method(osf(0.5), "OSF", NOTHING),
    "osf-0.9": Method(osf(0.9), "OSF", NOTHING),
    "guardspace-0.95": Method(guardspace(0.95), "GuardSpace", STATISTICS),
    "guardspace-0.8": Method(guardspace(0.8), "GuardSpace", STATISTICS),
    # Methods on the data and at inference.
    "similarity": Method(screening(), "similarity screening", ROWS),
    "sot": Method(sot(), "SOT", ROWS),
    "replay-own": Method(replay(own=True), "replay, own answers", ROWS),
    "replay-own-1": Method(replay(1.0, own=True), "replay, own answers", ROWS),
    "lora+scans": Method(plain(), "plain LoRA + SCANS", ROWS, preferences=True, steer=scans),
    "lora+alphasteer": Method(plain(), "plain LoRA + AlphaSteer", ROWS, preferences=True, steer=alphasteer),
    "agl+scans": Method(kl_budget(), "AGL + SCANS", ROWS, preferences=True, steer=scans),
    "agl+alphasteer": Method(kl_budget(), "AGL + AlphaSteer", ROWS, preferences=True, steer=alphasteer),
    "lapt": Method(lapt(), "LAPT", ROWS),
    "star-dss-1": Method(star_dss(1.0), "STAR-DSS", PAIR),
    "star-dss-5": Method(star_dss(5.0), "STAR-DSS", PAIR),
}
# On every protocol; the others are variants, on the first.
CORE = (
    "lora",
    "agl",
    "agl-kl-0.05",
    "agl-statistics",
    "agl-3",
    "budget-1e-3",
    "budget-3e-3",
    "anchor",
    "ewc-1e4",
    "replay",
    "kl",
)
CORE += ("safe-lora", "salora", "splora", "lox", "asft", "spf", "ogpsa", "lookahead-real", "lookahead-virtual")
QUICK = ("lora", "agl", "budget-3e-3", "replay")
