"""KL to a reference model: on an answer, the step that brings it within a budget, and the scale that ends there. Torch alone."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


FIRST_TOKENS = 5  # in which a refusal is decided
FIRST_SHARE = 0.5  # of a row's KL that is theirs


def top_k_kl(tokens: Tensor, reference: Tensor, log_probs: Tensor) -> Tensor:
    """
    KL divergence per position of two distributions over k + 1 outcomes, the kept tokens and any other,

        KL(p_ref ‖ p) ≈ Σ_top p_ref log(p_ref / p) + r_ref log(r_ref / r),

    where `r` is what is left of either distribution: a lower bound that is exact in the kept tokens.

    Args:
        tokens (`Tensor`):
            Most likely next tokens of the reference, of shape `(positions, k)`.
        reference (`Tensor`):
            Their log-probabilities there, of the same shape.
        log_probs (`Tensor`):
            Log-probabilities of all tokens now, of shape `(positions, vocabulary)`.

    Returns:
        `Tensor`:
            In nats, of shape `(positions,)`.
    """
    kept = log_probs.gather(1, tokens)
    p = reference.exp()
    tail_ref = (1 - p.sum(1)).clamp_min(1e-6)
    tail = (1 - kept.exp().sum(1)).clamp_min(1e-6)
    return (p * (reference - kept)).sum(1) + tail_ref * (tail_ref.log() - tail.log())


def kl_of_row(per_token: Tensor) -> Tensor:
    """
    KL of one answer, in nats per token: half of it the mean over all its tokens, half the mean over the first five, in which a
    refusal is decided and which a long answer would drown. A scalar.
    """
    return (1 - FIRST_SHARE) * per_token.mean() + FIRST_SHARE * per_token[:FIRST_TOKENS].mean()


def projection_step(kl: Tensor, aim: float, gradient_norm: Tensor, radius: Tensor) -> Tensor:
    """
    How far to go against the gradient g of a KL k for its linearisation to be at an aim b (Polyak's step),

        η = (k − b)₊ / ‖g‖²,    at most radius / ‖g‖;

    0 where the KL is within its aim, k or g is no number, or g is zero. Near the reference k is quadratic, and the step goes at most half the
    way back to it: it can't overshoot.

    Args:
        kl (`Tensor`):
            k, a scalar.
        aim (`float`):
            b.
        gradient_norm (`Tensor`):
            ‖g‖, a scalar.
        radius (`Tensor`):
            Longest step, a scalar.
    """
    tiny = torch.finfo(torch.float32).tiny
    eta = torch.minimum(
        (kl - aim).clamp_min(0) / gradient_norm.square().clamp_min(tiny), radius / gradient_norm.clamp_min(tiny)
    )
    sound = kl.isfinite() & gradient_norm.isfinite() & (gradient_norm > 0) & eta.isfinite()
    return torch.where(sound, eta, torch.zeros_like(eta))


def largest_scale(excess: Callable[[float], float], *, slack: float = 0.05, tries: int = 12) -> float:
    """
    The largest scale c in [0, 1] of an update at which a measure is at most 1, up to a slack: 1 if it is so there; otherwise from
    between a scale that is too large and one that is not, where a power law through what was measured last has it (the first time
    a square, as of a quadratic form), or by halves where that does not shrink the gap. The last scale asked is the one returned.

    Args:
        excess (`Callable`):
            The measure over its limit, at a scale; 0 at 0.
        slack (`float`, *optional*, defaults to `0.05`):
            A scale whose measure is between 1 − slack and 1 is taken.
        tries (`int`, *optional*, defaults to `12`):
            How often it may be asked.

    Returns:
        `float`:
            The scale; 0 where no other was found.
    """
    high, above = 1.0, excess(1.0)
    if above <= 1:
        return 1.0
    low, below = 0.0, 0.0
    for number in range(tries):
        power = math.log(above / below) / math.log(high / low) if below > 0 else 2.0
        scale = high * ((1 - slack / 2) / above) ** (1 / power) if math.isfinite(above) and power > 0 else 0.0
        if not low < scale < high or number % 4 == 3:
            scale = (low + high) / 2
        measured = excess(scale)
        if 1 - slack <= measured <= 1:
            return scale
        low, below, high, above = (scale, measured, high, above) if measured <= 1 else (low, below, scale, measured)
    if low > 0:
        excess(low)
    return low
