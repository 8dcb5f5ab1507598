"""What differs from the base model and is no linear layer: tensors that an adapter trains beside these, or of a checkpoint."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from .names import named_modules
from .sharding import whole


ROWS = 4096  # of a tensor that are looked at together


@dataclass
class TrainedTensor:
    """
    Tensor that an adapter trains beside its layers: of `modules_to_save`, or the rows of `trainable_token_indices`.

    Args:
        name (`str`):
            Its name in the *base* model, such as `"lm_head.weight"`.
        trained (`Module`):
            What holds the trained tensor; asked anew on every call, because FSDP2 replaces parameters.
        path (`str`):
            Where in it.
        frozen (`Module`):
            What holds the tensor of the base model.
        frozen_path (`str`):
            Where in it.
        rows (`list[int]`, *optional*):
            Rows of the base's tensor that the trained one takes the place of; by default all.
        reference (`Tensor`, *optional*):
            The trained tensor at the start of training, of an adapter that had already moved; `None` where it was the base's.
    """

    name: str
    trained: nn.Module
    path: str
    frozen: nn.Module
    frozen_path: str
    rows: list[int] | None = None
    reference: Tensor | None = None

    def parameter(self) -> Tensor:
        """The trained tensor."""
        return self.trained.get_parameter(self.path)

    def keep_reference(self) -> None:
        """Take the tensor as it is now for its start, where none is known yet."""
        if self.reference is None:
            self.reference = whole(self.parameter()).detach().clone()

    @torch.no_grad()
    def relative_change(self) -> float:
        """`‖W′ − W₀‖ / ‖W‖` in the Frobenius norm, from the start W₀ of training, over the whole tensor W of the base model."""
        base = whole(self.frozen.get_parameter(self.frozen_path))
        start = (base if self.rows is None else base[self.rows]) if self.reference is None else self.reference
        return relative_change(start, whole(self.parameter()), base)


@dataclass
class EmbeddingFactor(TrainedTensor):
    """
    One of the two LoRA factors on an embedding, `W′ = W + s(BA)ᵀ`. No input covariance tells how much a row of an embedding
    counts, so that the change is told by its norm, by B for both.

    Args:
        scaling (`float`):
            s.
        A ([`EmbeddingFactor`], *optional*):
            The other factor, of B.
    """

    scaling: float = 1.0
    A: "EmbeddingFactor | None" = None

    @torch.no_grad()
    def relative_change(self) -> float:
        """`‖W′ − W₀‖ / ‖W‖` in the Frobenius norm, without forming a matrix of the vocabulary's size; 0 of A."""
        if self.A is None:
            return 0.0
        B, A = (whole(factor.parameter()).cpu().double() for factor in (self, self.A))
        if self.reference is not None and self.A.reference is not None:
            B = torch.cat([B, -self.reference.to(B)], 1)
            A = torch.cat([A, self.A.reference.to(A)])
        squared = ((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0).item()
        norm = torch.linalg.vector_norm(whole(self.frozen.get_parameter("weight")), dtype=torch.float32).item()
        return self.scaling * squared**0.5 / norm if norm > 0 else float(squared > 0)


def _embedding_factors(name: str, module: LoraEmbedding, adapter: str) -> list[EmbeddingFactor]:
    base, scaling = module.get_base_layer(), module.scaling[adapter]
    A = EmbeddingFactor(
        f"{name}.lora_embedding_A", module.lora_embedding_A, adapter, base, "weight", None, None, scaling
    )
    B = EmbeddingFactor(f"{name}.weight", module.lora_embedding_B, adapter, base, "weight", None, None, scaling, A)
    return [A, B]


def trained_tensors(model: PeftModel, adapter: str) -> tuple[TrainedTensor, ...]:
    """
    What an adapter trains beside its layers, and LoRA on embeddings, each tensor once; whether it may be trained further makes
    no difference.
    """
    found: list[TrainedTensor] = []
    for name, module in named_modules(model.get_base_model()):
        if isinstance(module, LoraEmbedding) and adapter in module.lora_embedding_A and not module.lora_variant:
            found += _embedding_factors(name, module, adapter)
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            saved = module.modules_to_save[adapter]
            found += [
                TrainedTensor(f"{name}.{path}", saved, path, module.original_module, path)
                for path, _ in saved.named_parameters()
            ]
        elif isinstance(module, TrainableTokensWrapper) and not module.token_adapter.tied_adapter:
            tokens = module.token_adapter
            if adapter in tokens.trainable_tokens_delta:
                path, rows = f"trainable_tokens_delta.{adapter}", list(tokens.token_indices[adapter])
                found.append(TrainedTensor(f"{name}.weight", tokens, path, tokens.get_base_layer(), "weight", rows))
    return tuple(found)


@torch.no_grad()
def changed_tensors(base: nn.Module, tuned: nn.Module, without: Collection[str]) -> dict[str, float]:
    """
    How far the tensors of a checkpoint are from those of its base model, by name, where they are more than rounded to
    another type: `‖W′ − W‖ / ‖W‖` in the Frobenius norm, of tied ones under the first name; NaN of one that holds NaN.

    Args:
        base (`Module`):
            Base model.
        tuned (`Module`):
            Tuned model.
        without (`Collection[str]`):
            Names of tensors that are measured otherwise.

    Raises:
        `ValueError`: If one of the two has a tensor that the other lacks, or of another shape.
    """
    ours, others = (dict(model.named_parameters(remove_duplicate=False)) for model in (base, tuned))
    for where, lacking in (("tuned model", {*ours} - {*others}), ("base model", {*others} - {*ours})):
        if lacking:
            raise ValueError(
                f"The {where} has no tensor '{min(lacking)}', but the other has: they are of different architectures."
            )
    changes: dict[str, float] = {}
    seen: set[tuple[int, int]] = set()
    for name, tensor in ours.items():
        other = others[name]
        if (id(tensor), id(other)) in seen:
            continue
        seen.add((id(tensor), id(other)))
        if name not in without and (change := relative_change(tensor, other, tensor)) != 0:
            changes[name] = change
    return changes


@torch.no_grad()
def relative_change(before: Tensor, after: Tensor, base: Tensor) -> float:
    """
    `‖after − before‖ / ‖base‖`: 0 where they are the same but for rounding, 1 where the base is zero. Rows that one side alone
    has (of a resized vocabulary) count whole.

    Raises:
        `ValueError`: If they differ in more than the number of rows.
    """
    if same_but_for_rounding(before, after):
        return 0.0
    if before.shape[1:] != after.shape[1:] or before.dim() != after.dim():
        raise ValueError(
            f"A tensor of the tuned model has shape {[*after.shape]}, but {[*before.shape]} in the base model."
        )
    if before.dim() == 0:
        before, after = before[None], after[None]
    common = min(len(before), len(after))
    pairs = zip(
        before[:common].split(ROWS), after[:common].split(ROWS), strict=True
    )  # a vocabulary in float32 is large
    squares = [(one.float() - other.to(one.device).float()).square().sum() for one, other in pairs]
    squares += [rest.float().square().sum().to(before.device) for rest in (before[common:], after[common:])]
    norm = torch.linalg.vector_norm(base, dtype=torch.float32).to(before.device)
    return (torch.stack(squares).sum().sqrt() / norm).item() if norm > 0 else 1.0


@torch.no_grad()
def same_but_for_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether either of two tensors is the other, rounded to its type: a checkpoint saved in another type has not moved."""
    if one.shape != other.shape or one.is_meta or other.is_meta:
        return False
    one = one.to(other.device)
    return torch.equal(one.to(other.dtype), other) or torch.equal(other.to(one.dtype), one)
