"""The tensors that a strategy holds, from a layer's backward until the clip factors are known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dpkernels import ops
from dpkernels.layers import margins
from dpkernels.layers.operands import Around, Factored, Operand
from dpkernels.ops.sums import squared_norms

#: values of per-sample gradients that `recompute` forms at a time
_FORMED_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 26}


@dataclass(frozen=True)
class Recomputed:
    """An operand whose gradients are formed twice, a few samples at a time, and never kept.

    The same op forms the gradients both times, from the same samples, so the norms are those of the
    very values that are summed.
    """

    operand: Operand
    #: number of samples whose gradients are formed at a time
    chunk: int

    def norm_sq(self) -> torch.Tensor:
        return torch.cat([squared_norms(grads) for _, grads in self._formed()])

    def norm_bound(self, norm_sq: torch.Tensor) -> torch.Tensor:
        return margins.of_values(norm_sq)

    def grad_sample(self) -> torch.Tensor:
        return torch.cat([grads for _, grads in self._formed()])

    def clipped_grad(self, clip_factor: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor | None = None
        for samples, grads in self._formed():
            total = torch.zeros_like(grads[0]) if total is None else total
            ops.weighted_sum_(total, grads, clip_factor[samples])
        if total is None:
            raise ValueError("clipped_grad(): no sample, expected at least one")
        return total

    def _formed(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for first in range(0, self.operand.samples, self.chunk):
            samples = slice(first, first + self.chunk)
            yield samples, self.operand.part(samples).grad_sample()


@dataclass(frozen=True)
class OnBackend(Around):
    """An operand whose kernels run on one backend."""

    backend: str

    def norm_sq(self) -> torch.Tensor:
        with ops.use_backend(self.backend):
            return self.operand.norm_sq()

    def grad_sample(self) -> torch.Tensor:
        with ops.use_backend(self.backend):
            return self.operand.grad_sample()

    def clipped_grad(self, clip_factor: torch.Tensor) -> torch.Tensor:
        with ops.use_backend(self.backend):
            return self.operand.clipped_grad(clip_factor)


def held_by(
    strategy: str, operand: Operand, parameter: torch.Tensor, backend: str | None = None
) -> torch.Tensor | Factored:
    """The form in which a strategy holds an operand until the clip factors are known.

    Args:
        strategy: one of :data:`dpkernels.layers.costs.STRATEGIES`.
        operand: the gradient of `parameter`.
        parameter: the parameter, for its number of values and its device.
        backend: the backend that runs the kernels; None leaves the choice to the registry.

    Returns:
        Per-sample gradients [B, *shape], or a gradient that is still factored.
    """
    chosen = operand if backend is None else OnBackend(operand, backend)
    if strategy in ("store", "single"):
        return chosen.grad_sample()
    if strategy == "recompute":
        values = _FORMED_AT_ONCE.get(parameter.device.type, _FORMED_AT_ONCE["cpu"])
        return Recomputed(chosen, max(1, values // max(1, parameter.numel())))
    return chosen
