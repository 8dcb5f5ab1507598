"""
SOT push-pull (arXiv 2601.07200): weights of the training rows that move their distribution towards trusted safe rows and away
from harmful ones, in the model's representations.

    min_w  OT(P_w, P_safe) − λ OT(P_w, P_harm)      over weights w on the training rows

OT is the entropic optimal transport of Sinkhorn, with squared distances for costs. Its gradient in w is the dual potential of the
rows, so that a mirror step is `w ← w exp(−η (f_safe − λ f_harm))`, made to sum to 1. The rows with the largest w stay, and each
counts in the loss by its w, of mean 1.

Faithful: the objective, Sinkhorn, top-K, the importance-weighted loss. Inferred: there is no published code; the mirror steps and
their number, λ = 1, K = 85 % of the rows, ε = 0.05 of the mean cost, and the states at the end of the prompt in the middle layer.
The references are the protected rows: look-alikes that are answered are safe, unsafe requests are harmful.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from trl import SFTConfig, SFTTrainer

from agl_trl.data.alignment import tokenize_rows
from agl_trl.miniworld import load_model

from .representations import middle, prompt_states, protected_states
from .setting import Setting, build, common


def sinkhorn(cost: Tensor, w: Tensor, epsilon: float, iterations: int = 50) -> tuple[Tensor, Tensor]:
    """
    Entropic optimal transport from weights w, of shape `(n,)`, to equal weights on the m references.

    Returns:
        `tuple[Tensor, Tensor]`: the plan, of shape `(n, m)`, whose rows sum to w, and the potential f, of shape `(n,)` and mean 0.
    """
    target = torch.full((cost.shape[1],), 1 / cost.shape[1], dtype=cost.dtype).log()
    g = torch.zeros_like(target)
    for _ in range(iterations):
        f = -epsilon * (target + (g - cost) / epsilon).logsumexp(1)
        g = -epsilon * (w.log()[:, None] + (f[:, None] - cost) / epsilon).logsumexp(0)
    f = -epsilon * (target + (g - cost) / epsilon).logsumexp(1)
    plan = (w.log()[:, None] + target + (f[:, None] + g - cost) / epsilon).exp()
    return plan, f - f.mean()


def row_weights(states: Tensor, safe: Tensor, unsafe: Tensor, *, push: float = 1.0, steps: int = 10) -> Tensor:
    """Weights of rows `(n, d)`, which sum to 1, after so many mirror steps, λ being `push`."""
    costs = [torch.cdist(states, other).square() for other in (safe, unsafe)]
    scale = torch.stack([cost.mean() for cost in costs]).mean()
    w = torch.full((len(states),), 1 / len(states), dtype=states.dtype)
    for _ in range(steps):
        pull, away = (sinkhorn(cost / scale, w, 0.05)[1] for cost in costs)
        w = (w.log() - (pull - push * away) / steps).softmax(0)  # η: one unit of cost over all steps
    return w


def kept_weights(w: Tensor, share: float) -> Tensor:
    """Weights of mean 1 of the share of the rows that weigh most; 0 of the others."""
    kept = torch.zeros_like(w)
    most = w.argsort(descending=True, stable=True)[: round(share * len(w))]
    kept[most] = w[most] / w[most].mean()
    return kept


class WeightedTrainer(SFTTrainer):
    """SFT whose rows have a column `row_weight`: `Σ_i w_i Σ_t nll_it / Σ_i T_i` over the answer tokens of a batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights, labels = inputs.pop("row_weight"), inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        nll = cross_entropy(
            outputs.logits[:, :-1].float().mT, labels[:, 1:], reduction="none"
        )  # 0 where it is no label
        loss = (weights[:, None] * nll).sum() / (labels[:, 1:] != -100).sum()
        return (loss, outputs) if return_outputs else loss


def sot(share: float = 0.85) -> Callable[[Setting], SFTTrainer]:
    """With K as a share of the rows."""

    def make(setting: Setting) -> SFTTrainer:
        model = load_model()
        unsafe, safe = map(middle, protected_states(model, setting.tokenizer, setting.seed))
        states = middle(prompt_states(model, setting.tokenizer, tokenize_rows(setting.train, setting.tokenizer)))
        weights = kept_weights(row_weights(states, safe, unsafe), share)
        train = setting.train.add_column("row_weight", weights.tolist()).filter(lambda row: row["row_weight"] > 0)
        args = SFTConfig(**common(setting, remove_unused_columns=False))
        trainer = build(WeightedTrainer, args, setting, train_dataset=train)
        collate = trainer.data_collator

        def weighted(rows: list[dict]) -> dict[str, Tensor]:
            return {**collate(rows), "row_weight": torch.tensor([row["row_weight"] for row in rows])}

        trainer.data_collator = weighted
        return trainer

    return make
