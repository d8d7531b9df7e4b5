"""The sum over the samples of a logical batch in floating point, with noise once, in ``p.grad``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from opacus.optimizers.optimizer import _generate_noise
from torch import nn

from dpkernels import ops
from dpkernels.engine.processes.collectives import Processes
from dpkernels.engine.release.pending import ParameterGradient
from dpkernels.engine.release.records import Mechanism
from dpkernels.ops.noise.source import NoiseSource


@dataclass(frozen=True)
class Pass:
    """One backward pass, as it is added to the sum of its logical batch.

    Attributes:
        parameters: the trained parameters, in the optimizer's order.
        gradients: by parameter that a contribution reached: the per-sample gradients.
        factors: by parameter, [B]: clip factor of each sample's gradient as captured, the scale
            from captured to per-sample gradients included.
        mechanism: the mechanism of the logical batch so far.
        last: whether the physical batch is the last of its logical batch.
        noise_std: standard deviation of the noise that this pass adds; 0 for none.
        divisor: divisor of the sum with this pass.
        earlier_divisor: divisor of the earlier sum, which stands in ``p.grad``; None if the logical
            batch has written no ``p.grad`` yet.
        generator: draws the noise; None for ChaCha20.
        keep_factors: whether factored gradients must stay in memory until the end of the pass.
    """

    parameters: Sequence[nn.Parameter]
    gradients: Mapping[nn.Parameter, ParameterGradient]
    factors: Mapping[nn.Parameter, torch.Tensor]
    mechanism: Mechanism
    last: bool
    noise_std: float
    divisor: float
    earlier_divisor: float | None
    generator: torch.Generator | None
    keep_factors: bool


class PrivateSum(Protocol):
    """The sum over the samples of one logical batch, from its first physical batch on."""

    def norm_sq(self, gradient: ParameterGradient) -> torch.Tensor:
        """[B]: squared norms of one parameter's per-sample gradients, as captured."""

    def begin(self, taken: Pass) -> None:
        """Raise ``ValueError`` for a pass that cannot be added; the sum stays as before."""

    def write(self, taken: Pass) -> dict[nn.Parameter, torch.Tensor]:
        """Add the samples of one pass; after an exception the sum can only be dropped.

        Returns:
            By parameter, the new ``p.grad``, noise included; empty unless the pass is the last.
        """

    def clear(self) -> None:
        """Drop the sum."""


class NoisySum:
    """Sums in float32 at least, kept in ``p.summed_grad`` until the noise is added.

    Guarantees:
        Noise of standard deviation ``noise_std`` is added to the sum of every trained parameter,
        once over all processes.

    Args:
        processes: the processes that train together.
        source: draws the noise of passes without a generator.
    """

    def __init__(self, processes: Processes, source: NoiseSource):
        self._processes = processes
        self._source = source

    def norm_sq(self, gradient: ParameterGradient) -> torch.Tensor:
        return gradient.norm_sq()

    def clear(self) -> None:
        """Nothing to do: ``zero_grad()`` clears ``p.summed_grad``, as Opacus has it."""

    def begin(self, taken: Pass) -> None:
        """Every pass can be added."""

    def write(self, taken: Pass) -> dict[nn.Parameter, torch.Tensor]:
        finished = bool(taken.noise_std) or taken.earlier_divisor is not None
        scale = 1.0 / taken.divisor if taken.last else 1.0
        # Sum from the last layer to the first: embedding tables stand first and need the largest
        # buffers, and by then the other layers' factors have been freed.
        terms = [self._term(p, taken) for p in reversed(taken.parameters)][::-1]
        own_std = self._processes.own_noise(taken.noise_std)
        if taken.generator is None or not own_std:
            self._finish(terms, own_std, scale if finished else 1.0)
        else:
            self._finish(terms, 0.0, 1.0)
            for term in terms:
                draw(term.total, own_std, self._source, taken.generator).mul_(scale)
        for parameter, term in zip(taken.parameters, terms, strict=True):
            parameter.summed_grad = None if finished else term.total  # type: ignore[attr-defined]
        if not taken.last:
            return {}
        totals = [term.total if finished else term.total * scale for term in terms]
        shard_std = self._processes.shard_noise(taken.noise_std) * scale
        reduced = self._processes.reduce(dict(zip(taken.parameters, totals)))
        for total in reduced.values():
            draw(total, shard_std, self._source, taken.generator)
        return {p: self._processes.gradient(p, total) for p, total in reduced.items()}

    def _term(self, parameter: nn.Parameter, taken: Pass) -> _Term:
        """One parameter's sum: earlier passes, factored gradients, stored gradients yet to add."""
        if taken.earlier_divisor is None:
            total = getattr(parameter, "summed_grad", None)
        else:
            total = self._processes.earlier(parameter)
            if total is not None:
                total = total.to(_sum_dtype(parameter)) * taken.earlier_divisor
        gradient, factor = taken.gradients.get(parameter), taken.factors.get(parameter, _NOBODY)
        if gradient is not None and gradient.factored is not None:
            clipped = gradient.factored.clipped_grad(factor).reshape(parameter.shape)
            if not taken.keep_factors:
                gradient.let_go()
            total = clipped if total is None else total.add_(clipped)
        if gradient is not None and gradient.stored is not None:
            stored = gradient.stored
        else:
            stored, factor = torch.empty((0, *parameter.shape), device=parameter.device), factor[:0]
        accumulate = total is not None
        if total is None:
            total = torch.empty(
                parameter.shape, dtype=_sum_dtype(parameter), device=parameter.device
            )
        return _Term(total, stored, factor.to(total.device), accumulate)

    def _finish(self, terms: list[_Term], noise_std: float, scale: float) -> None:
        """total = scale * ((total if accumulate) + sum_b factor[b] stored[b] + noise), for each."""
        for device in dict.fromkeys(term.total.device for term in terms):
            here = [term for term in terms if term.total.device == device]
            totals = [term.total for term in here]
            key, blocks = self._source.take_each([t.numel() if noise_std else 0 for t in totals])
            ops.finish_grads_(
                totals,
                [term.stored for term in here],
                [term.factor for term in here],
                noise_std,
                scale,
                key,
                blocks,
                [term.accumulate for term in here],
            )


#: clip factors of a parameter that no contribution reached
_NOBODY = torch.zeros(0)


@dataclass(frozen=True)
class _Term:
    """One parameter's sum: ``sum_b factor[b] stored[b]``, added to `total` if `accumulate`."""

    total: torch.Tensor
    stored: torch.Tensor
    factor: torch.Tensor
    accumulate: bool


def _sum_dtype(parameter: nn.Parameter) -> torch.dtype:
    """The dtype of a parameter's sum: float32 at least."""
    return torch.promote_types(parameter.dtype, torch.float32)


def draw(
    tensor: torch.Tensor, std: float, source: NoiseSource, generator: torch.Generator | None
) -> torch.Tensor:
    """Add noise of standard deviation `std` in place.

    Args:
        tensor: any shape.
        std: >= 0; nothing is drawn for 0.
        source: key and counters of ChaCha20's noise.
        generator: draws the noise instead of ChaCha20; None for ChaCha20.
    """
    if not std:
        return tensor
    if generator is not None:
        return tensor.add_(_generate_noise(std, tensor, generator=generator))
    return ops.gaussian_noise_(tensor, std, *source.take(tensor.numel()))
