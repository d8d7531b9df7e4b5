"""What leaves the engine: clipped sums with noise once per logical batch, in ``p.grad``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from opacus.optimizers.optimizer import _generate_noise
from torch import nn
from torch.optim import Optimizer

from dpkernels import ops
from dpkernels.engine.capture.streams import Streams
from dpkernels.engine.processes.collectives import Processes
from dpkernels.engine.release.clipping import Clipping
from dpkernels.engine.release.loss_scale import ScaledLossOptimizer
from dpkernels.engine.release.pending import ParameterGradient
from dpkernels.engine.release.records import Mechanism
from dpkernels.ops.noise.source import NoiseSource


class ReleasingOptimizer(ScaledLossOptimizer):
    """The part of the optimizer that adds up what was clipped, draws the noise and writes both.

    Guarantees:
        Noise is added exactly once per logical batch, to every parameter in training, for the
        mechanism that all processes agree on.

    Args:
        optimizer: the wrapped optimizer.
        clipping: how factors were chosen, which says how much noise gradients get.
        processes: the processes that train together.
        kwargs: what an Opacus ``DPOptimizer`` takes, by name.
    """

    max_grad_norm: float

    def __init__(
        self, optimizer: Optimizer, *, clipping: Clipping, processes: Processes, **kwargs: Any
    ):
        super().__init__(optimizer, **kwargs)
        self.clipping = clipping
        self.processes = processes
        self.processes.check_generator(self.generator)
        self.streams = Streams()
        self._noise = NoiseSource()
        self._iterations = 0
        self._mechanism: Mechanism | None = None
        self._private: dict[nn.Parameter, torch.Tensor] = {}

    def is_last_physical_batch(self) -> bool:
        """Whether the backward pass to come ends a logical batch."""
        return not self._check_skip_next_step(pop_next=False)

    def _release(
        self,
        found: dict[nn.Parameter, ParameterGradient],
        factors: dict[nn.Parameter, torch.Tensor],
    ) -> None:
        """Write the clipped sum, with noise on the last physical batch, for every parameter."""
        last = self.is_last_physical_batch()
        if last and self._iterations and any(p.grad is None for p in self.params):
            raise ValueError(
                "backward(): a parameter has no gradient, so no noise, from the backward pass "
                "before: it was cleared or unfrozen while accumulating; call optimizer.zero_grad()"
            )
        mechanism = self._remember_mechanism()
        if last:
            mechanism = self._agree(mechanism)
        noise_std = self._noise_std(mechanism) if last and not self._iterations else 0.0
        self._write(found, factors, last, noise_std)
        if last:
            self._iterations += 1

    def _write(
        self,
        found: dict[nn.Parameter, ParameterGradient],
        factors: dict[nn.Parameter, torch.Tensor],
        last: bool,
        noise_std: float,
    ) -> None:
        """Add up and, on the last physical batch, add noise and write every ``p.grad``."""
        again = last and self._iterations > 0
        finished = bool(noise_std) or again
        scale = 1.0 / self._divisor(self._iterations + 1) if last else 1.0
        # from the last layer on: tables, the largest sums, then find the others' factors gone
        sums = [
            self._sum(p, found.get(p), factors.get(p, _NOBODY), again)
            for p in reversed(self.params)
        ][::-1]
        self._finish(sums, self.processes.own_noise(noise_std), scale if finished else 1.0)
        for parameter, each in zip(self.params, sums, strict=True):
            parameter.summed_grad = None if finished else each.total  # type: ignore[attr-defined]
        if not last:
            return
        totals = [each.total if finished else each.total * scale for each in sums]
        shard_noise_std = self.processes.shard_noise(noise_std) * scale
        for parameter, total in self.processes.reduce(dict(zip(self.params, totals))).items():
            self._draw(total, shard_noise_std)
            parameter.grad = self.processes.gradient(parameter, total)
            self._private[parameter] = parameter.grad

    def _sum(
        self,
        parameter: nn.Parameter,
        gradient: ParameterGradient | None,
        factor: torch.Tensor,
        again: bool,
    ) -> _Sum:
        """What one parameter's sum is made of; `again` adds to the gradient of a pass before."""
        total: torch.Tensor | None
        device = parameter.device
        if again:
            total = self.processes.earlier(parameter)
            if total is not None:
                total = total.to(_sum_dtype(parameter)) * self._divisor(self._iterations)
        else:
            total = getattr(parameter, "summed_grad", None)
        if gradient is not None and gradient.factored is not None:
            clipped = gradient.factored.clipped_grad(factor).reshape(parameter.shape)
            if not self.streams.several:
                gradient.let_go()
            total = clipped if total is None else total.add_(clipped)
        if gradient is not None and gradient.stored is not None:
            stored = gradient.stored
        else:
            stored, factor = torch.empty((0, *parameter.shape), device=device), factor[:0]
        accumulate = total is not None
        if total is None:
            total = torch.empty(parameter.shape, dtype=_sum_dtype(parameter), device=device)
        return _Sum(total, stored, factor.to(device), accumulate)

    def _noise_std(self, mechanism: Mechanism) -> float:
        """Standard deviation of the noise on the sum of one logical batch."""
        return float(self.clipping.gradient_noise(self.noise_multiplier) * mechanism.bound)

    def _finish(self, sums: list[_Sum], noise_std: float, scale: float) -> None:
        """total = scale * ((total if accumulate) + sum_b factor[b] stored[b] + noise), for each."""
        if self.generator is not None and noise_std:
            self._finish(sums, 0.0, 1.0)
            for each in sums:
                self._draw(each.total, noise_std).mul_(scale)
            return
        for device in dict.fromkeys(each.total.device for each in sums):
            here = [each for each in sums if each.total.device == device]
            totals = [each.total for each in here]
            key, blocks = self._noise.take_each([t.numel() if noise_std else 0 for t in totals])
            ops.finish_grads_(
                totals,
                [each.stored for each in here],
                [each.factor for each in here],
                noise_std,
                scale,
                key,
                blocks,
                [each.accumulate for each in here],
            )

    def _divisor(self, iterations: int) -> float:
        """What the sum over `iterations` backward passes is divided by."""
        return self._expected_samples(iterations) if self.loss_reduction == "mean" else 1.0

    def _expected_samples(self, iterations: int) -> float:
        """The expected number of samples of all processes in `iterations` backward passes."""
        return float(self.expected_batch_size or 0) * iterations * self.processes.world_size

    def _remember_mechanism(self) -> Mechanism:
        """Note the noise multiplier and the largest bound of the logical batch under way."""
        bound = float(self.max_grad_norm)
        if self._mechanism is not None:
            if self._iterations and bound > self._mechanism.bound:
                raise ValueError(
                    f"max_grad_norm={bound}: it was {self._mechanism.bound} in the backward pass "
                    "that drew the noise; change it after optimizer.step(), not while accumulating"
                )
            bound = max(bound, self._mechanism.bound)
        self._mechanism = Mechanism(float(self.noise_multiplier), bound)
        return self._mechanism

    def _agree(self, mechanism: Mechanism) -> Mechanism:
        """The mechanism of all processes: one noise multiplier, the largest of their bounds."""
        bound = self.processes.agree(
            bound=mechanism.bound,
            noise_multiplier=mechanism.noise_multiplier,
            accumulated_iterations=self._iterations,
            expected_batch_size=float(self.expected_batch_size or 0),
        )
        self._mechanism = Mechanism(mechanism.noise_multiplier, bound)
        return self._mechanism

    def _draw_once(self, tensor: torch.Tensor, std: float) -> torch.Tensor:
        """The sum of `tensor` over processes, with noise that the first of them draws."""
        return self.processes.total(self._draw(tensor, std if self.processes.rank == 0 else 0.0))

    def _draw(self, tensor: torch.Tensor, std: float) -> torch.Tensor:
        """Add noise of standard deviation `std` in place."""
        if not std:
            return tensor
        if self.generator is not None:
            return tensor.add_(_generate_noise(std, tensor, generator=self.generator))
        return ops.gaussian_noise_(tensor, std, *self._noise.take(tensor.numel()))


#: the factors where nobody's gradient reached a parameter
_NOBODY = torch.zeros(0)


@dataclass(frozen=True)
class _Sum:
    """One parameter's sum: what `total` holds if `accumulate`, and samples times factors."""

    total: torch.Tensor
    stored: torch.Tensor
    factor: torch.Tensor
    accumulate: bool


def _sum_dtype(parameter: nn.Parameter) -> torch.dtype:
    """Sums are kept in float32 at least."""
    return torch.promote_types(parameter.dtype, torch.float32)
