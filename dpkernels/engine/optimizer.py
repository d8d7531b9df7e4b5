"""The optimizer whose gradients are private before ``step()`` is called."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _generate_noise
from opacus.optimizers.utils import params
from torch import nn
from torch.optim import Optimizer

from dpkernels import ops
from dpkernels.engine.clipping import make_clipping, total_norm_sq
from dpkernels.engine.distributed import Processes
from dpkernels.engine.gradients import ParameterGradient, PendingGradients
from dpkernels.engine.scaling import ScaledLossOptimizer, warn_of_overflow
from dpkernels.engine.steps import Mechanism, StepCounter, StepReport
from dpkernels.ops.noise.source import NoiseSource


class FusedDPOptimizer(ScaledLossOptimizer):
    """An Opacus ``DPOptimizer`` that clips, sums and adds noise at the end of ``backward()``.

    After ``loss.backward()`` on the last physical batch of a logical step, ``p.grad`` holds
    ``(sum_b clip_factor[b] * grad_sample[b] + noise_multiplier * max_grad_norm * z) /
    expected_batch_size`` (docs/math.md, section 1). ``step()`` refuses any other gradient.

    Guarantees:
        With factors of at most ``max_grad_norm / norm``, one sample moves the sum by at most
        ``max_grad_norm``. Noise is added exactly once per logical step, also for parameters that
        no sample reached and for empty batches.

    Args:
        optimizer: the wrapped optimizer.
        noise_multiplier: std of the noise divided by `max_grad_norm`.
        max_grad_norm: bound C on each sample's gradient norm.
        expected_batch_size: the denominator q * N; None with ``loss_reduction="sum"``.
        loss_reduction: ``"mean"`` or ``"sum"``, as the criterion reduces over the physical batch.
        generator: draws the noise from this torch generator; None draws it from ChaCha20 keyed by
            the operating system.
        clipping: ``"flat"``, ``"automatic"``, ``"per_layer"`` (`max_grad_norm` is then a list) or
            ``"adaptive"`` (its settings as further keyword arguments).
        views_per_sample: rows per sample, averaged before clipping.
        materialize_grad_samples: also leave ``p.grad_sample``, [B, *p.shape].
        processes: the processes that train together; `expected_batch_size` is then that of one.
    """

    max_grad_norm: float

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float | list[float],
        expected_batch_size: float | None,
        loss_reduction: str = "mean",
        generator: torch.Generator | None = None,
        clipping: str = "flat",
        views_per_sample: int = 1,
        materialize_grad_samples: bool = False,
        processes: Processes | None = None,
        **kwargs: Any,
    ):
        strategy = make_clipping(
            clipping, max_grad_norm, noise_multiplier, params(optimizer), kwargs
        )
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=strategy.max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction,
            generator=generator,
            **kwargs,
        )
        self.views_per_sample = views_per_sample
        self.materialize_grad_samples = materialize_grad_samples
        self.last_step: StepReport | None = None
        self.grad_accumulation_allowed = True
        self.clipping = strategy
        self.processes = Processes() if processes is None else processes
        self.processes.check_generator(generator)
        self._noise = NoiseSource()
        self._iterations = 0
        self._consumed = False
        self._mechanism: Mechanism | None = None
        self._private: dict[nn.Parameter, torch.Tensor] = {}

    @property
    def accumulated_iterations(self) -> int:
        """Number of backward passes in the gradient that ``step()`` will use."""
        return max(self._iterations, 1)

    def attach_step_hook(self, fn: Callable[[DPOptimizer], None]) -> None:
        """Call `fn` before each step, in the place of what was attached before.

        As in Opacus there is one such hook, and the engine's counts the steps; a warning says so
        when another takes its place. ``register_step_post_hook`` adds hooks.
        """
        if isinstance(self.step_hook, StepCounter):
            warnings.warn(
                "attach_step_hook(): replaces the hook that counts steps for the accountant, so "
                "get_epsilon() will not grow unless yours counts them; register_step_post_hook() "
                "adds one beside it",
                stacklevel=2,
            )
        super().attach_step_hook(fn)

    def is_last_physical_batch(self) -> bool:
        """Whether the backward pass to come ends a logical batch."""
        return not self._check_skip_next_step(pop_next=False)

    def held_parameters(self) -> list[nn.Parameter]:
        """Every parameter of every group, also those that are frozen now."""
        return [p for group in self.original_optimizer.param_groups for p in group["params"]]

    def privatize(self, gradients: PendingGradients) -> None:
        """Clip, sum, add noise, into ``p.grad``: called at the end of each backward pass.

        Raises:
            ValueError: a gradient is not finite, or an earlier one was not consumed or cleared.
        """
        self._check_cleared()
        factors = self._clip(gradients)
        self._release({} if gradients.empty else gradients.gradients, factors)

    def make_private_noise_only(self) -> None:
        """The gradient of an empty batch: noise alone, as the mechanism demands.

        For training loops that skip the forward pass when Poisson sampling draws nobody; follow it
        with ``step()``, which counts.
        """
        self.processes.check_noise_only()
        self._check_cleared()
        self.last_step = None
        self._release({}, {})

    def _check_cleared(self) -> None:
        cleared = all(p.grad is None for p in self.params)
        if self._consumed and cleared and not self._is_last_step_skipped:
            self.zero_grad(set_to_none=True)
        if self._consumed:
            raise ValueError(
                "Gradients haven't been cleared since the last optimizer step. In order to obtain "
                "privacy guarantees you must call optimizer.zero_grad() on each step"
            )
        if self._iterations and not self.grad_accumulation_allowed:
            raise ValueError(
                "Poisson sampling is not compatible with grad accumulation. You need to call "
                "optimizer.step() after every forward/backward pass or consider using "
                "BatchMemoryManager"
            )

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

    def _sample_scale(self, samples: int) -> float:
        """What a captured gradient is multiplied by to be the gradient of one sample's loss."""
        rows = float(samples) if self.loss_reduction == "mean" else 1.0 / self.views_per_sample
        return rows / self.loss_scale()

    def _clip(self, gradients: PendingGradients) -> dict[nn.Parameter, torch.Tensor]:
        """By parameter, [B]: what captured gradients are multiplied by, clip factor times scale."""
        samples = gradients.samples
        if samples is None:
            raise ValueError("gradients: expected those of a backward pass under way, got none")
        scale = self._sample_scale(samples)
        norm_sq = {p: self._norm_sq(g) * scale**2 for p, g in gradients.gradients.items()}
        if not norm_sq or gradients.empty:
            self.last_step = None
            return {}
        total = total_norm_sq(norm_sq.values())
        if self.drops_overflow():
            warn_of_overflow(total)
        else:
            gradients.refuse_not_finite(total)
        bound_sq = {p: g.bound_sq() * scale**2 for p, g in gradients.gradients.items()}
        factors = self.clipping.factors(bound_sq, float(self.max_grad_norm))
        self.clipping.observe(factors)
        distinct = list({id(f): f for f in factors.values()}.values())
        clip_factor = distinct[0] if len(distinct) == 1 else torch.stack(distinct)
        self.last_step = StepReport(total.sqrt(), clip_factor)
        if self.materialize_grad_samples:
            for parameter in self.params:
                gradient = gradients.gradients.get(parameter)
                if gradient is None:
                    grad_sample = torch.zeros(
                        (samples, *parameter.shape),
                        dtype=parameter.dtype,
                        device=parameter.device,
                    )
                else:
                    grad_sample = gradient.materialize() * scale
                self._leave_grad_sample(parameter, grad_sample)
        return {p: factor * scale for p, factor in factors.items()}

    def _norm_sq(self, gradient: ParameterGradient) -> torch.Tensor:
        """[B]: squared norms of the captured gradients of one parameter."""
        return gradient.norm_sq()

    def _leave_grad_sample(self, parameter: nn.Parameter, grad_sample: torch.Tensor) -> None:
        """Set ``parameter.grad_sample``; a list, as Opacus has it, where passes accumulate."""
        earlier = getattr(parameter, "grad_sample", None)
        if self._iterations and earlier is not None:
            earlier = earlier if isinstance(earlier, list) else [earlier]
            parameter.grad_sample = [*earlier, grad_sample]  # type: ignore[attr-defined]
        else:
            parameter.grad_sample = grad_sample  # type: ignore[attr-defined]

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
        sums = [self._sum(p, found.get(p), factors.get(p, _NOBODY), again) for p in self.params]
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

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear gradients; sums of physical batches survive until their logical batch ends.

        A parameter that was frozen meanwhile has none, not zeros that momentum would follow.
        """
        for p in self.params:
            p.grad_sample = None
        if not self._is_last_step_skipped:
            for p in self.params:
                p.summed_grad = None
            self._mechanism = None
            self.clipping.reset()
        self._iterations = 0
        self._consumed = False
        self._private.clear()
        self.original_optimizer.zero_grad(set_to_none)
        for p in self.held_parameters():
            if not p.requires_grad:
                p.grad = None

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool | None:
        """Check that every gradient is private, and count the step with the accountant.

        Returns:
            True if the wrapped optimizer shall step, False on a physical batch before the last.

        Raises:
            ValueError: no backward pass was made since the last step or ``zero_grad()``, or a
                gradient did not come from the engine.
        """
        if not any(p.requires_grad for p in self.params):
            return True
        if self._check_skip_next_step():
            if self._iterations:
                raise ValueError(
                    "signal_skip_step() came after backward(), which had already added the noise; "
                    "call it before the backward pass of a physical batch that is not the last"
                )
            self._is_last_step_skipped = True
            self._consumed = True
            return False
        if self._consumed:
            self._check_cleared()
        if not self._iterations or self._mechanism is None:
            raise ValueError(
                "Per sample gradient is not initialized. Not updated in backward pass? "
                "Call loss.backward() on the private model before optimizer.step()"
            )
        self._check_private(self._mechanism)
        if self.step_hook:
            self.step_hook(self)
        expected = self._expected_samples(self._iterations)
        self.max_grad_norm = self.clipping.next_bound(self.max_grad_norm, expected, self._draw_once)
        self._is_last_step_skipped = False
        self._consumed = True
        return True

    def _check_private(self, drawn: Mechanism) -> None:
        """Every gradient is the engine's, and the mechanism is the one that will be counted."""
        if drawn.noise_multiplier != float(self.noise_multiplier):
            raise ValueError(
                f"noise_multiplier={self.noise_multiplier}: the noise was drawn in backward() with "
                f"{drawn.noise_multiplier}; step the noise scheduler after optimizer.step()"
            )
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad is not self._private.get(p):
                    raise ValueError(
                        f"optimizer.step(): the gradient of a parameter of shape {tuple(p.shape)} "
                        "was not made private by the engine; leave p.grad as backward() wrote it "
                        "(in-place changes are allowed), and call zero_grad() before backward()"
                    )

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

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_optimizer_") and "original_optimizer" in self.__dict__:
            return getattr(self.original_optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.update(_private={}, last_step=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


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
