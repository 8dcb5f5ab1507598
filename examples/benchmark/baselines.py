"""The makers of what is no peer's: plain LoRA, AGL in its forms, and the baselines L2, replay, KL and EWC, which are written out here."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import DPOTrainer, SFTConfig, SFTTrainer

from agl_trl import AGLSFTConfig, AGLSFTTrainer, FisherStatistics
from agl_trl.data.alignment import batches, select_rows, tokenize_row
from agl_trl.experiments.demo import LORA
from agl_trl.fisher.reference_answers import ReferenceAnswers
from agl_trl.miniworld import alignment_dataset, load_model
from agl_trl.modeling.generation import answered_by
from agl_trl.modeling.lora import base_weight, linear_layers
from agl_trl.objective.covariance import LowRankCovariance
from agl_trl.trainer.anchor import Anchor

from .setting import (
    Setting,
    batch_nll,
    build,
    common,
    protected_rows,
    published_statistics,
    reference_answers,
)


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


def kl_budget(budget: float | None = None, own: bool = False, **options: Any) -> Callable[[Setting], SFTTrainer]:
    """
    AGL as it is by default: a budget on the KL on protected rows, of which refusals and look-alikes are in the run; with the answers
    that come with them, or the aligned model's own, as for [`replay`].
    """

    def make(setting: Setting) -> SFTTrainer | DPOTrainer:
        trainer_class, config_class = setting.agl
        rows = alignment_dataset()
        if own:
            asked = list(rows.remove_columns("completion"))
            rows = Dataset.from_list(answered_by(load_model(), setting.tokenizer, asked, progress=False))
        args = config_class(**common(setting, kl_budget=budget, **options))
        return build(trainer_class, args, setting, alignment_dataset=rows)

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
    """KL to the reference model on rows to refuse and to answer, in every step: those that AGL has, mean over rows, weight 1 unless said."""

    coef, rows_per_step = 1.0, 16
    references: ReferenceAnswers

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        anchor = Anchor(self.references, 1, self.rows_per_step, self.args.seed)
        self.accelerator.backward(self.coef * anchor.kl(self.model, "alignment", self.state.global_step)[0])
        return loss


def kl(coef: float = 1.0) -> Callable[[Setting], SFTTrainer]:
    """With the weight of the KL."""

    def make(setting: Setting) -> SFTTrainer:
        trainer = build(KLTrainer, SFTConfig(**common(setting)), setting)
        trainer.coef = coef
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
