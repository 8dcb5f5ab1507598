"""The AlignGuard quadratic form of a LoRA update, factored and batched. Imports torch alone."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .covariance import LowRankCovariance


# Numbers of all eigenvectors up to which they stay in float32: of a small model, casting them would cost as much as a product.
KEPT_WHOLE = 2**22


class LoraFactors(NamedTuple):
    """
    Update `ΔW = s B A` of one layer, never multiplied out.

    Args:
        A (`Tensor`):
            `lora_A` weight, of shape `(r, d_in)`.
        B (`Tensor`):
            `lora_B` weight, of shape `(d_out, r)`.
        scaling (`float`):
            s: α/r, or α/√r with rsLoRA.
    """

    A: Tensor
    B: Tensor
    scaling: float


class LayerMetric(NamedTuple):
    """
    K-FAC Fisher metric `𝓕 = G_δ ⊗ X` of one layer and the norm of its weight in it.

    Args:
        input (`LowRankCovariance`):
            Input covariance `X = E[x xᵀ]`, of dimension `d_in`.
        output (`LowRankCovariance`, *optional*):
            Shrunk output-gradient covariance `G_δ`, of dimension `d_out`; `None` is the identity (δ = 1).
        weight_norm (`Tensor`):
            `‖W‖_𝓕 = √tr(Wᵀ G_δ W X)`, a scalar.
    """

    input: LowRankCovariance
    output: LowRankCovariance | None
    weight_norm: Tensor

    def to(self, *args, **kwargs) -> "LayerMetric":
        """Same metric with every tensor moved or cast as by `Tensor.to`."""
        output = None if self.output is None else self.output.to(*args, **kwargs)
        return LayerMetric(self.input.to(*args, **kwargs), output, self.weight_norm.to(*args, **kwargs))

    def mean_eigenvalue(self) -> Tensor:
        """Mean eigenvalue of 𝓕, that of X, because `G_δ` has mean eigenvalue one."""
        return self.input.trace() / self.input.dim


def quadratic_form(A: Tensor, B: Tensor, scaling: Tensor | float, metric: LayerMetric) -> Tensor:
    """
    Squared norm of the update in the Fisher metric (the complete form of AlignGuard-LoRA's, arXiv 2508.02079),

        ‖ΔW‖²_𝓕 = tr(ΔWᵀ G_δ ΔW X) = s² · tr((Bᵀ G_δ B)(A X Aᵀ)),

    in O(r·(d_in + d_out)·(r + k)); with δ = 1 it is `E‖ΔW x‖²`. Batched over leading dimensions.

    Args:
        A (`Tensor`):
            Of shape `(..., r, d_in)`.
        B (`Tensor`):
            Of shape `(..., d_out, r)`.
        scaling (`Tensor` or `float`):
            s, of shape `(...)`.
        metric (`LayerMetric`):
            Metric with the same leading dimensions.

    Returns:
        `Tensor`: of shape `(...)`.
    """
    outer = B.mT @ B if metric.output is None else metric.output.gram(B.mT)  # (..., r, r)
    return scaling**2 * (outer * metric.input.gram(A)).sum((-2, -1))


def dense_quadratic_form(weight: Tensor, metric: LayerMetric) -> Tensor:
    """`tr(Wᵀ G_δ W X)` of a dense matrix `W` of shape `(..., d_out, d_in)`; used once per layer, for `‖W‖²_𝓕`."""
    form = metric.input.row_forms(weight).sum(-1)
    if metric.output is None:
        return form
    projected = metric.output.eigenvectors.mT @ weight  # (..., k, d_in)
    return metric.output.remainder * form + (metric.output.excess * metric.input.row_forms(projected)).sum(-1)


class LayerGroup(NamedTuple):
    """
    Layers of equal shape, on one device, handled by one batched call.

    Args:
        indices (`list[int]`):
            Their positions among all layers.
        scaling (`Tensor`):
            s, of shape `(layers,)`.
        kept (`LayerMetric`):
            Their metrics, stacked, with eigenvectors in the type they are stored in and those of the inputs without repetition.
        input_of (`Tensor`):
            Which of the inputs' eigenvectors each layer reads, of shape `(layers,)`.
    """

    indices: list[int]
    scaling: Tensor
    kept: LayerMetric
    input_of: Tensor

    @property
    def metric(self) -> LayerMetric:
        """One metric with a leading layer dimension, in float32: made when asked for, several times larger than what is kept."""
        V = self.kept.input.eigenvectors[self.input_of]
        return self.kept._replace(input=self.kept.input._replace(eigenvectors=V)).to(torch.float32)


def grouped(
    metrics: Sequence[LayerMetric],
    factors: Sequence[LoraFactors],
    others: Sequence[LayerMetric] | None = None,
) -> list[LayerGroup]:
    """
    Group layers whose tensors stack.

    Args:
        metrics (`Sequence[LayerMetric]`):
            One per layer; where layers share the eigenvectors of their input (the very tensor), all groups read one copy.
        factors (`Sequence[LoraFactors]`):
            Factors of the same layers; only their shapes, scalings and devices are read.
        others (`Sequence[LayerMetric]`, *optional*):
            Second metrics of the same layers that must stack too.
    """
    groups: dict[tuple, list[int]] = defaultdict(list)
    distinct: dict[tuple, dict[int, Tensor]] = defaultdict(dict)  # by device, type and shape
    for index, (metric, factor) in enumerate(zip(metrics, factors, strict=True)):
        V, device = metric.input.eigenvectors, factor.A.device
        ranks = [_ranks(metric)] + ([_ranks(others[index])] if others is not None else [])
        groups[(device, V.dtype, V.shape), factor.A.shape, factor.B.shape, *ranks].append(index)
        distinct[device, V.dtype, V.shape][id(V)] = V
    inputs = {key: torch.stack([V.to(key[0]) for V in tensors.values()]) for key, tensors in distinct.items()}
    position = {key: {name: i for i, name in enumerate(tensors)} for key, tensors in distinct.items()}
    return [
        LayerGroup(
            indices,
            torch.tensor([factors[i].scaling for i in indices], device=key[0]),
            _stacked([metrics[i] for i in indices], key[0], inputs[key]),
            torch.tensor([position[key][id(metrics[i].input.eigenvectors)] for i in indices], device=key[0]),
        )
        for (key, *_), indices in groups.items()
    ]


def _ranks(metric: LayerMetric) -> tuple[int, int | None]:
    output = None if metric.output is None else metric.output.eigenvalues.shape[-1]
    return metric.input.eigenvalues.shape[-1], output


def _stacked(metrics: Sequence[LayerMetric], device: torch.device, inputs: Tensor) -> LayerMetric:
    """One metric with a leading layer dimension, but for the given eigenvectors of the inputs."""

    def stack(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([part.to(device) for part in parts])

    values, remainders = zip(*(metric.input[1:] for metric in metrics), strict=True)
    outputs = [metric.output for metric in metrics if metric.output is not None]
    return LayerMetric(
        input=LowRankCovariance(inputs, stack(values), stack(remainders)),
        output=LowRankCovariance(*map(stack, zip(*outputs, strict=True))) if outputs else None,
        weight_norm=stack([metric.weight_norm for metric in metrics]),
    )


class InputSide(NamedTuple):
    """
    What the form reads of the A of one group's layers; small, whatever the size of the layers.

    Args:
        coordinates (`Tensor`):
            `A V`, of shape `(layers, r, k)`, in the eigenvectors of X.
        gram (`Tensor`):
            `A X Aᵀ`, of shape `(layers, r, r)`.
    """

    coordinates: Tensor
    gram: Tensor


class _Spectrum(NamedTuple):
    """What the form reads of a group beside its eigenvectors, in float32: ρ and λ − ρ of X, and `(s / ‖W‖_𝓕)²`."""

    remainder: Tensor  # (layers, 1, 1)
    excess: Tensor  # (layers, 1, k)
    share: Tensor  # (layers,)


def _spectrum(group: LayerGroup) -> _Spectrum:
    X = group.kept.input
    share = (group.scaling / group.kept.weight_norm.float()) ** 2
    return _Spectrum(X.remainder.float()[:, None, None], X.excess.float()[:, None, :], share)


class RelativeDrift:
    """
    Relative drift of every layer, `‖ΔW‖²_𝓕 / ‖W‖²_𝓕`: *the* number of this project, dimensionless, and zero at the
    reference weights.

    Args:
        groups (`list[LayerGroup]`):
            All layers, in groups of equal shape.
    """

    def __init__(self, groups: list[LayerGroup]):
        self.groups = groups
        (device,) = {group.scaling.device for group in groups if 0 in group.indices}
        self.inverse = torch.tensor([index for group in groups for index in group.indices], device=device).argsort()
        size = sum(len(group.indices) * group.kept.input.eigenvectors[0].numel() for group in groups)
        self._metrics = [group.metric for group in groups] if size <= KEPT_WHOLE else None
        self._spectra = [_spectrum(group) for group in groups]

    def _grouped(self) -> Iterator[tuple[LayerGroup, Tensor, LowRankCovariance | None, "_Spectrum"]]:
        """Groups with the eigenvectors of X and with `G_δ` in float32, and their small constants."""
        for number, group in enumerate(self.groups):
            X, G, _ = group.metric if self._metrics is None else self._metrics[number]
            yield group, X.eigenvectors, G, self._spectra[number]

    def __call__(self, factors: Sequence[LoraFactors]) -> Tensor:
        """Relative drift per layer, of shape `(len(factors),)`, in float32 on the device of the first layer's factors."""
        return self.value(self.input_sides(factors), self.output_grams(factors))

    def input_sides(self, factors: Sequence[LoraFactors]) -> list[InputSide]:
        """What the form reads of A, one entry per group."""
        sides = []
        for group, V, _, (remainder, excess, _) in self._grouped():
            A = torch.stack([factors[i].A for i in group.indices]).float()
            AV = torch.bmm(A, V)
            sides.append(InputSide(AV, torch.baddbmm(remainder * torch.bmm(A, A.mT), AV * excess, AV.mT)))
        return sides

    def output_grams(self, factors: Sequence[LoraFactors]) -> list[Tensor]:
        """`Bᵀ G_δ B` of shape `(layers, r, r)`, one entry per group."""
        grams = []
        for group, _, G, _ in self._grouped():
            B = torch.stack([factors[i].B for i in group.indices]).float()
            grams.append(torch.bmm(B.mT, B) if G is None else G.gram(B.mT))
        return grams

    def value(self, inputs: Sequence[InputSide], outputs: Sequence[Tensor]) -> Tensor:
        """`s² tr((Bᵀ G_δ B)(A X Aᵀ)) / ‖W‖²_𝓕` per layer, of shape `(layers,)`."""
        device = self.inverse.device
        drifts = [
            (share * (side.gram * gram).sum((1, 2))).to(device)
            for (*_, share), side, gram in zip(self._spectra, inputs, outputs, strict=True)
        ]
        return torch.cat(drifts)[self.inverse]

    @torch.no_grad()
    def gradients(
        self,
        factors: Sequence[LoraFactors],
        inputs: Sequence[InputSide],
        outputs: Sequence[Tensor],
        weight: Tensor | float,
    ) -> list[Tensor]:
        """
        Gradients of `weight · D`, D being the mean over layers, in closed form, a third of the work of automatic differentiation:

            ∂‖ΔW‖²_𝓕/∂A = 2s² (Bᵀ G_δ B) A X,    ∂‖ΔW‖²_𝓕/∂B = 2s² G_δ B (A X Aᵀ).

        Args:
            factors (`Sequence[LoraFactors]`):
                Factors at which the gradients are taken.
            inputs (`Sequence[InputSide]`):
                [`input_sides`] of these factors.
            outputs (`Sequence[Tensor]`):
                [`output_grams`] of these factors.
            weight (`Tensor` or `float`):
                A scalar.

        Returns:
            `list[Tensor]`: float32, with respect to A and B of every layer in turn.
        """
        gradients: list[Tensor] = [self.inverse] * (2 * len(factors))
        twice = 2 / len(factors) * weight
        for (group, V, G, (remainder, excess, share)), side, gram in zip(
            self._grouped(), inputs, outputs, strict=True
        ):
            A = torch.stack([factors[i].A for i in group.indices]).float()
            B = torch.stack([factors[i].B for i in group.indices]).float()
            # A model may be spread over several devices, and the weight lies on that of its first layer.
            scale = (torch.as_tensor(twice, device=share.device) * share)[:, None, None]
            AX = torch.baddbmm(remainder * A, side.coordinates * excess, V.mT)
            GB = B if G is None else G.apply(B.mT).mT
            of_A, of_B = torch.bmm(scale * gram, AX), torch.bmm(GB, scale * side.gram)
            for index, gradient_A, gradient_B in zip(group.indices, of_A.unbind(), of_B.unbind(), strict=True):
                gradients[2 * index : 2 * index + 2] = gradient_A, gradient_B
        return gradients
