"""
AlphaSteer (arXiv 2506.07022): steering by a linear map that is nothing on safe states and the refusal direction on unsafe ones.

    h ← h + α h D      D = P D̃,  D̃ = (XᵀX + λ PᵀP)⁺ XᵀR,  X = H_unsafe P

P projects onto the half of the eigenvectors of `H_safeᵀ H_safe` with the smallest eigenvalues; every row of R is
`mean(h | unsafe) − mean(h | safe)`.

Faithful: the equations, the middle layers. Inferred: α = 1; λ, which is 10 for large models, is a tenth of the mean eigenvalue of
`XᵀX` in the null space (states here are of another size); the answer is steered from the end of the prompt on. Unsafe states are
those at the end of protected unsafe requests, safe ones those of look-alikes and of as many training rows, at all their answers'
tokens, seen by the tuned model.
"""

from contextlib import AbstractContextManager

import torch
from peft import PeftModel
from torch import Tensor

from agl_trl.data.alignment import tokenize_rows
from agl_trl.fisher.protected_rows import COMPLY

from .representations import answer_states, protected_states
from .setting import Setting, protected_rows
from .steering import answer_opening, steered_layers, steering


def null_space_map(
    unsafe: Tensor, safe: Tensor, direction: Tensor, *, ratio: float = 0.5, ridge: float = 0.1
) -> Tensor:
    """D of shape `(d, d)`, from states `(rows, d)`, in a basis of the null space, where `PᵀP` is the identity."""
    _, vectors = torch.linalg.eigh(safe.mT @ safe)  # ascending
    Q = vectors[:, : round(ratio * len(vectors))]
    Z = unsafe @ Q
    gram = Z.mT @ Z
    penalty = ridge * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
    return Q @ torch.linalg.solve(gram + penalty, Z.mT @ direction.expand(len(Z), -1))


def alphasteer(model: PeftModel, setting: Setting, strength: float = 1.0) -> AbstractContextManager[None]:
    """The context in which a model answers under AlphaSteer, with α."""
    tokenizer = setting.tokenizer
    unsafe, safe = protected_states(model, tokenizer, setting.seed)
    rows, kinds = protected_rows(tokenizer, setting.seed)
    benign = [row for row, kind in zip(rows, kinds, strict=True) if kind == COMPLY]
    benign += tokenize_rows(setting.train.select(range(min(len(benign), len(setting.train)))), tokenizer)
    states = answer_states(model, tokenizer, benign)
    maps = {
        i: null_space_map(unsafe[i], states[i], unsafe[i].mean(0) - safe[i].mean(0)) for i in steered_layers(model)
    }
    return steering(model, answer_opening(tokenizer), lambda layer, output, _: strength * output @ maps[layer])
