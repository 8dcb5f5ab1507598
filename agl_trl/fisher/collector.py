"""Hooks on linear layers that accumulate the covariances of one pass."""

from functools import partial
from typing import Self

import torch
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn

from ..objective.covariance import CovarianceSketch, sketch_matrix


class Collector:
    """
    Hooks that accumulate X and G of linear layers, alive exactly as long as the `with` block.

    Args:
        layers (`dict[str, Module]`):
            Layers by name.
        rank (`int`):
            Eigenpairs that will be kept.
        gradients (`bool`):
            Whether G is accumulated too.
        seed (`int`):
            Seed of the sketch.
        skip_unused (`bool`, *optional*, defaults to `False`):
            Whether layers that do not see every token (a vision tower, experts) are left out and named in `skipped`, rather
            than refused.
    """

    def __init__(
        self, layers: dict[str, nn.Module], rank: int, gradients: bool, seed: int, *, skip_unused: bool = False
    ):
        self.layers, self.gradients, self.skip_unused = layers, gradients, skip_unused
        self.skipped: set[str] = set()
        self.input_of: dict[str, str] = {}  # layer -> first layer that reads the same input tensor
        self.inputs: dict[str, CovarianceSketch] = {}
        self.outputs: dict[str, CovarianceSketch] = {}
        self._seen: dict[int, tuple[str, Tensor]] = {}  # holding the tensor keeps its id from being given away
        self._omega = partial(self._cached_omega, {}, rank, seed)
        self._handles: list = []

    @staticmethod
    def _cached_omega(
        cache: dict[tuple[int, torch.device], Tensor | None], rank: int, seed: int, dim: int, device: torch.device
    ) -> Tensor | None:
        if (dim, device) not in cache:  # one for all layers on a device: it is as large as the sums of one of them
            omega = sketch_matrix(dim, rank, seed)
            cache[dim, device] = None if omega is None else omega.to(device)
        return cache[dim, device]

    def __enter__(self) -> Self:
        self._handles = [
            module.register_forward_hook(partial(self._on_forward, name)) for name, module in self.layers.items()
        ]
        return self

    def __exit__(self, *exc) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen.clear()

    def restore(self, done: int, input_of: dict[str, str], sums: dict[str, dict[str, dict[str, Tensor]]]) -> int:
        """Take over the sums of an interrupted pass. Returns how many batches they hold."""
        self.input_of.update(input_of)
        for side, sketches in (("inputs", self.inputs), ("outputs", self.outputs)):
            for name, parts in sums.get(side, {}).items():
                dim = parts["sums"].shape[0]
                sketches[name] = CovarianceSketch(dim, self._omega(dim, parts["sums"].device))
                sketches[name].sums, sketches[name].trace, sketches[name].count = (
                    parts[part] for part in ("sums", "trace", "count")
                )
        return done

    def begin(self, token_mask: Tensor) -> None:
        """Start a batch, given which of its tokens count, of shape `(tokens,)`."""
        self.token_mask = token_mask
        self._seen.clear()

    def _on_forward(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        if name in self.skipped:
            return
        x = args[0]
        if name not in self.input_of:  # in the first batch alone, so that no later one keeps its inputs alive
            self.input_of[name], _ = self._seen.setdefault(id(x), (name, x))
        if self.input_of[name] == name:
            self._update(self.inputs, name, x)
        if self.gradients and output.requires_grad:
            output.register_hook(partial(self._update, self.outputs, name))

    @torch.no_grad()
    def _update(self, sketches: dict[str, CovarianceSketch], name: str, values: Tensor) -> None:
        rows = values.detach().reshape(-1, values.shape[-1])
        if rows.shape[0] != self.token_mask.shape[0]:
            if self.skip_unused:
                self.skipped.add(name)
                return
            raise ValueError(
                f"Layer '{name}' saw {rows.shape[0]} rows for {self.token_mask.shape[0]} tokens: layers that do not see every "
                "token (experts, vision towers) can't be guarded; leave them out of `target_modules`."
            )
        if name not in sketches:
            sketches[name] = CovarianceSketch(rows.shape[1], self._omega(rows.shape[1], rows.device), rows.device)
        if sketches[name].sums.device != rows.device:  # read from a file
            sketches[name].to(rows.device, self._omega(rows.shape[1], rows.device))
        sketches[name].update(rows[self.token_mask.to(rows.device)])

    def sum_over_processes(self) -> None:
        """
        Add up the accumulated sums of all processes, once. What one of them skips, or some of them do not reach, all skip.

        Raises:
            `ValueError`: In all of them, if a layer that may not be left out saw tokens in some alone.
        """
        skipped, *reached = zip(*gather_object([(self.skipped, {*self.input_of}, {*self.outputs})]), strict=True)
        in_some = {name for sets in reached for name in set.union(*sets) - set.intersection(*sets)}
        if in_some and not self.skip_unused:
            raise ValueError(
                f"Layer '{min(in_some)}' saw tokens in some processes alone: layers that do not see every token (experts, vision "
                "towers) can't be guarded; leave them out of `target_modules`."
            )
        self.skipped = set.union(*skipped, in_some)
        if self.skipped:
            self._leave_out()
        for sketches in (self.inputs, self.outputs):
            for name in sorted(sketches):
                sketch = sketches[name]
                sketch.sums, sketch.trace, sketch.count = (
                    reduce(tensor, "sum") for tensor in (sketch.sums, sketch.trace, sketch.count)
                )

    def check(self) -> None:
        """
        Check that every layer saw the tokens, or leave out those that did not.

        Raises:
            `ValueError`: If one did not and may not be left out, none is left, or sums are not finite.
        """
        most = max((int(sketch.count) for sketch in self.inputs.values()), default=0)
        least = max(most, 1) if self.skip_unused else 1
        for name in self.layers:
            covered = [self.inputs.get(self.input_of.get(name, ""))]
            if self.gradients:
                covered.append(self.outputs.get(name))
            if all(sketch is not None and sketch.count >= least for sketch in covered):
                continue
            if not self.skip_unused:
                raise ValueError(
                    f"Layer '{name}' saw no tokens while the Fisher statistics were estimated: it is not used by the forward "
                    "pass over text (a vision tower, a fused kernel, an unused branch), so it can't be guarded; leave it out of "
                    "`target_modules`, or name it in `exclude_modules`."
                )
            self.skipped.add(name)
        if self.skipped:
            self._leave_out()
        for name, sketch in [*self.inputs.items(), *self.outputs.items()]:
            if not torch.isfinite(sketch.sums).all():
                raise ValueError(
                    f"The statistics of layer '{name}' are not finite: its activations overflow; use bfloat16."
                )

    def _leave_out(self) -> None:
        """Keep nothing of the layers that are skipped; what reads the input of one of them becomes the first to read it."""
        # In the order of the layers, which an interrupted pass does not change.
        kept = {
            name: self.input_of[name] for name in self.layers if name in self.input_of and name not in self.skipped
        }
        if not kept:
            raise ValueError("No linear layer of the model saw all tokens of the rows: there is nothing to measure.")
        firsts = {first: first for first in kept.values() if first in kept}
        for name, first in kept.items():
            firsts.setdefault(first, name)
        self.input_of = {name: firsts[first] for name, first in kept.items()}
        self.inputs = {firsts[first]: sketch for first, sketch in self.inputs.items() if first in firsts}
        self.outputs = {name: sketch for name, sketch in self.outputs.items() if name in kept}
