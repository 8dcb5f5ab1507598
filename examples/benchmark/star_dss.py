"""
STAR-DSS (NeurIPS 2025, arXiv 2505.17196): a guard scores every partial answer, and what it finds unsafe is held to the reference model.

With s_t in [0, 1] for the answer up to token t (1 is safe) and π₀ the model with its adapter off:

    L = E[ s_t · −log π(y_t) + (1 − s_t) λ KL(π₀ ‖ π)_t ],      s_t = σ(b + log π₀(y_1…y_k) − log π_b(y_1…y_k)),   k = min(t, 5)

Data it needs: a guard; here the weights before alignment, π_b, beside the aligned ones, or the aligned model and the world's judge.

Faithful: the loss, token by token. Inferred: λ = 1, and the guard. No guard model judges the texts of the embedded world, so s is the posterior
that an answer's beginning is the aligned model's and not that of the one before alignment, of which alignment took what is
unsafe; b = 5 are the prior's log-odds for benign rows. After five tokens s stays, as later ones tell the style of a new task more than safety.
The other guard, `judged`, is hard and made before training: a partial answer, by chunks of five tokens, is unsafe (s = 0) where the aligned
model refuses the prompt and the answer so far is no refusal, both as the judge of refusals says.
"""

from collections.abc import Callable

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from agl_trl.evaluation.refusal import judge_answer
from agl_trl.miniworld import load_model
from agl_trl.modeling.generation import generate_answers

from .kl_sft import AnchoredTrainer, token_losses
from .setting import Setting, build, common


FIRST_TOKENS = 5
GUARD_TOKENS = 16  # of the aligned model's answer: a refusal is told by its beginning


def scores(log_ratio: Tensor, mask: Tensor, prior: float) -> Tensor:
    """
    s of every token of the answers, of shape `(tokens,)`, those of a batch in its order.

    Args:
        log_ratio (`Tensor`):
            `log π₀ − log π_b` of every token, of shape `(batch, length)`.
        mask (`Tensor`):
            Boolean, of the same shape: which belong to an answer.
        prior (`float`):
            b.
    """
    first = mask & (mask.cumsum(1) <= FIRST_TOKENS)
    return torch.sigmoid(prior + (log_ratio * first).cumsum(1))[mask]


def scored(nll: Tensor, kl: Tensor, score: Tensor, coef: float) -> Tensor:
    """The loss of these tokens."""
    return (score * nll + (1 - score) * coef * kl).mean()


class StarTrainer(AnchoredTrainer):
    """`before` is the model before alignment."""

    before: PreTrainedModel
    prior = 5.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return scored(*self.losses(inputs), self.guard(inputs), self.coef)

    @torch.no_grad()
    def guard(self, inputs: dict[str, Tensor]) -> Tensor:
        """s of the tokens of a batch."""
        passed = dict(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        with self.model.disable_adapter():
            aligned = self.model(**passed).logits
        before = self.before(**passed).logits
        mask = inputs["labels"][:, 1:] != -100
        nll, _ = token_losses(aligned, before, inputs["input_ids"], inputs["labels"])
        nll_before, _ = token_losses(before, aligned, inputs["input_ids"], inputs["labels"])
        log_ratio = torch.zeros(mask.shape, device=nll.device).masked_scatter(mask, nll_before - nll)
        return scores(log_ratio, mask, self.prior)


class JudgedTrainer(StarTrainer):
    """`judged` holds s of the answer tokens of every training row, by the tokens of the row."""

    judged: dict[tuple[int, ...], Tensor]

    def guard(self, inputs: dict[str, Tensor]) -> Tensor:
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        return torch.cat([self.judged[tuple(row[mask].tolist())] for row, mask in rows]).to(self.model.device)


def judged_scores(setting: Setting, tokenized: Dataset) -> dict[tuple[int, ...], Tensor]:
    """s of every answer token of the training rows, which the trainer has as `tokenized`."""
    prompts = [row["prompt"] for row in setting.train]
    options = dict(max_new_tokens=GUARD_TOKENS, batch_size=256, progress=False)
    own = generate_answers(load_model(), setting.tokenizer, prompts, **options)
    found = {}
    for prompt, answer, row in zip(prompts, own, tokenized, strict=True):
        question = prompt[-1]["content"]
        ids = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        score = torch.ones(len(ids))
        if judge_answer(question, answer).label == "refusal":
            for start in range(0, len(ids), FIRST_TOKENS):
                so_far = setting.tokenizer.decode(ids[: start + FIRST_TOKENS], skip_special_tokens=True)
                score[start : start + FIRST_TOKENS] = judge_answer(question, so_far).label == "refusal"
        found[tuple(row["input_ids"])] = score
    return found


def star_dss(coef: float = 1.0, judged: bool = False) -> Callable[[Setting], SFTTrainer]:
    """With λ, and whether the guard is the judge."""

    def make(setting: Setting) -> SFTTrainer:
        trainer_class = JudgedTrainer if judged else StarTrainer
        trainer = build(trainer_class, SFTConfig(**common(setting, loss_type="nll")), setting)
        trainer.coef = coef
        if judged:
            trainer.judged = judged_scores(setting, trainer.train_dataset)
        else:
            trainer.before = load_model("base").eval()
        return trainer

    return make
