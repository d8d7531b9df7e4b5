"""The optimizer whose gradients are private before ``step()`` is called."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from copy import copy
from inspect import CO_GENERATOR
from types import FrameType
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from opacus.optimizers.utils import params
from torch import nn
from torch.optim import Optimizer

from dpkernels.engine.capture.streams import Streams, refuse_graph_capture
from dpkernels.engine.processes.collectives import Processes
from dpkernels.engine.release.clipping import make_clipping, total_norm_sq
from dpkernels.engine.release.logical_batch import LogicalBatch, State
from dpkernels.engine.release.loss_scale import ScaledLossOptimizer, warn_of_overflow
from dpkernels.engine.release.noisy_sum import NoisySum, Pass, PrivateSum, draw
from dpkernels.engine.release.pending import ParameterGradient, PendingGradients
from dpkernels.engine.release.records import Mechanism, StepCounter, StepReport
from dpkernels.engine.release.secure import GridSum, check_secure
from dpkernels.ops.noise.source import NoiseSource


class FusedDPOptimizer(ScaledLossOptimizer):
    """An Opacus ``DPOptimizer`` that clips, sums and adds noise at the end of ``backward()``.

    After ``loss.backward()`` on the last physical batch of a logical step, ``p.grad`` holds
    ``(sum_b clip_factor[b] * grad_sample[b] + noise_multiplier * max_grad_norm * z) /
    expected_batch_size`` (docs/math.md, section 1). ``step()`` refuses any other gradient.

    Guarantees:
        With factors of at most ``max_grad_norm / norm``, one sample moves the sum by at most
        ``max_grad_norm``. Noise is added exactly once per logical step, also for parameters that
        no sample reached and for empty batches, for the mechanism that all processes agree on.

    :class:`LogicalBatch` keeps the state between the calls and says which call may come next;
    :class:`PrivateSum` adds up samples and draws noise.

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
        processes: the processes that train together; `expected_batch_size` is one process's.
        secure_mode: sum integers and add discrete Gaussian noise (:class:`GridSum`).
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
        secure_mode: bool = False,
        **kwargs: Any,
    ):
        self.processes = Processes() if processes is None else processes
        if secure_mode:
            check_secure(clipping, self.processes, generator)
        self.processes.check_generator(generator)
        self.clipping = make_clipping(
            clipping, max_grad_norm, noise_multiplier, params(optimizer), kwargs
        )
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=self.clipping.max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction,
            generator=generator,
            secure_mode=secure_mode,
            **kwargs,
        )
        self.views_per_sample = views_per_sample
        self.materialize_grad_samples = materialize_grad_samples
        self.last_step: StepReport | None = None
        self.grad_accumulation_allowed = True
        self.streams = Streams()
        self.logical_batch = LogicalBatch()
        self._noise = NoiseSource()
        self.private_sum: PrivateSum = (
            GridSum(self._noise) if secure_mode else NoisySum(self.processes, self._noise)
        )
        #: frame of the generator that signals where logical batches end
        self._signals_from: FrameType | None = None
        #: by how many batches the signals run ahead of the steps; None before the first step.
        #: BatchMemoryManager signals when a batch is fetched, and prefetching fetches early.
        self._ahead: int | None = None

    @property
    def accumulated_iterations(self) -> int:
        """Number of backward passes in the gradient that ``step()`` will use."""
        return max(self.logical_batch.iterations, 1)

    def attach_step_hook(self, fn: Callable[[DPOptimizer], None]) -> None:
        """Call `fn` before each step, in the place of the hook that was attached before.

        As in Opacus there is one such hook, and the engine's own hook counts the steps: replacing
        the engine's hook warns. ``register_step_post_hook`` adds hooks.
        """
        if isinstance(self.step_hook, StepCounter):
            warnings.warn(
                "attach_step_hook(): replaces the hook that counts steps for the accountant, so "
                "get_epsilon() will not grow unless yours counts them; register_step_post_hook() "
                "adds one beside it",
                stacklevel=2,
            )
        super().attach_step_hook(fn)

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Say whether the next physical batch is not the last of its logical batch.

        ``BatchMemoryManager`` signals from a generator. When another generator signals, the loop
        has left the first: an unfinished logical batch is dropped, or the next would contain it.

        Raises:
            ValueError: a physical batch had no step, so the next step would take its signal.
        """
        caller = sys._getframe(1)
        if caller.f_code.co_flags & CO_GENERATOR:
            if caller is not self._signals_from:
                if self._signals_from is not None:
                    self._step_skip_queue.clear()
                    if self.logical_batch.abandon():
                        self.zero_grad(set_to_none=True)
                self._signals_from, self._ahead = caller, None
            elif self._ahead is not None and len(self._step_skip_queue) > self._ahead:
                raise ValueError(
                    "BatchMemoryManager: a physical batch was passed over without "
                    "optimizer.step(), so logical batches would end elsewhere than they were "
                    "drawn; step for each, after make_private_noise_only() instead of backward() "
                    "where there is nothing to learn from"
                )
        super().signal_skip_step(do_skip)

    def is_last_physical_batch(self) -> bool:
        """Whether the backward pass to come ends a logical batch."""
        return not self._check_skip_next_step(pop_next=False)

    def held_parameters(self) -> list[nn.Parameter]:
        """Every parameter of every group, frozen parameters included."""
        return [p for group in self.original_optimizer.param_groups for p in group["params"]]

    def privatize(self, gradients: PendingGradients) -> None:
        """Clip, sum, add noise, into ``p.grad``: called at the end of each backward pass.

        Raises:
            ValueError: a gradient is not finite, or an earlier one was not consumed or cleared.
        """
        if not self.params:
            return
        self._begin_pass()
        factors, scale = self._clip(gradients)
        self._release({} if gradients.empty else gradients.gradients, factors, scale)

    def make_private_noise_only(self) -> None:
        """The gradient of an empty batch: noise alone, as the mechanism demands.

        For training loops that skip the forward pass when Poisson sampling draws nobody; call
        ``step()`` afterwards, which counts the step.
        """
        refuse_graph_capture("make_private_noise_only()")
        self.processes.check_noise_only()
        self._begin_pass()
        self.last_step = None
        self.streams.gather()
        self._release({}, {}, 1.0)
        self.streams.complete()

    def _begin_pass(self) -> None:
        """Raise where no backward pass may come next; note every device, as each gets noise."""
        self._follow_cleared_gradients()
        self.logical_batch.check_backward(
            self.params,
            last=self.is_last_physical_batch(),
            accumulation_allowed=self.grad_accumulation_allowed,
        )
        for device in {p.device for p in self.params}:
            self.streams.note(device)

    def _follow_cleared_gradients(self) -> None:
        """Call ``zero_grad()`` for a loop that has set every ``p.grad`` to None itself."""
        if self.logical_batch.was_cleared_by_hand(self.params):
            self.zero_grad(set_to_none=True)

    def _clip(self, gradients: PendingGradients) -> tuple[dict[nn.Parameter, torch.Tensor], float]:
        """Clip factors by parameter, [B]; scale from captured gradients to per-sample gradients."""
        samples = gradients.samples
        if samples is None:
            raise ValueError("gradients: expected those of a backward pass under way, got none")
        rows = float(samples) if self.loss_reduction == "mean" else 1.0 / self.views_per_sample
        scale = rows / self.loss_scale()
        norm_sq = [self.private_sum.norm_sq(gradient) for gradient in gradients.gradients.values()]
        if not norm_sq or gradients.empty:
            self.last_step = None
            return {}, scale
        total = total_norm_sq(torch._foreach_mul(norm_sq, scale**2))
        if self.drops_overflow():
            warn_of_overflow(total)
        else:
            gradients.refuse_not_finite(total)
        bounds = [gradient.bound_sq() for gradient in gradients.gradients.values()]
        bound_sq = dict(zip(gradients.gradients, torch._foreach_mul(bounds, scale**2), strict=True))
        factors = self.clipping.factors(bound_sq, float(self.max_grad_norm))
        distinct = list({id(f): f for f in factors.values()}.values())
        clip_factor = distinct[0] if len(distinct) == 1 else torch.stack(distinct)
        self.last_step = StepReport(total.sqrt(), clip_factor)
        if self.materialize_grad_samples:
            for p in self.params:
                if p in gradients.gradients:
                    grad_sample = gradients.gradients[p].materialize() * scale
                else:
                    grad_sample = torch.zeros(samples, *p.shape, dtype=p.dtype, device=p.device)
                self._leave_grad_sample(p, grad_sample)
        return factors, scale

    def _release(
        self,
        gradients: dict[nn.Parameter, ParameterGradient],
        factors: dict[nn.Parameter, torch.Tensor],
        scale: float,
    ) -> None:
        """Add the clipped sum to the logical batch; in the last pass, add noise, set ``p.grad``."""
        batch, last = self.logical_batch, self.is_last_physical_batch()
        mechanism = batch.mechanism_with(float(self.noise_multiplier), float(self.max_grad_norm))
        if last:
            mechanism = self._agreed(mechanism)
        taken = Pass(
            parameters=self.params,
            gradients=gradients,
            factors={p: factor * scale for p, factor in factors.items()},
            mechanism=mechanism,
            last=last,
            noise_std=self._noise_std(mechanism) if last and not batch.iterations else 0.0,
            divisor=self._divisor(batch.iterations + 1),
            earlier_divisor=self._divisor(batch.iterations) if batch.iterations else None,
            generator=self.generator,
            keep_factors=self.streams.several,
        )
        self.private_sum.begin(taken)
        batch.begin_writing(mechanism)
        if factors:
            self.clipping.observe(factors)
        private = self.private_sum.write(taken)
        for parameter, gradient in private.items():
            parameter.grad = gradient
        batch.wrote(private, last=last)

    def _noise_std(self, mechanism: Mechanism) -> float:
        """Standard deviation of the noise on the sum of one logical batch."""
        return self.clipping.gradient_noise(mechanism.noise_multiplier) * mechanism.bound

    def _divisor(self, iterations: int) -> float:
        """Divisor of the sum over `iterations` backward passes."""
        return self._expected_samples(iterations) if self.loss_reduction == "mean" else 1.0

    def _expected_samples(self, iterations: int) -> float:
        """The expected number of samples of all processes in `iterations` backward passes."""
        return float(self.expected_batch_size or 0) * iterations * self.processes.world_size

    def _agreed(self, mechanism: Mechanism) -> Mechanism:
        """The mechanism of all processes: one noise multiplier, the largest bound of a process."""
        bound = self.processes.agree(
            bound=mechanism.bound,
            noise_multiplier=mechanism.noise_multiplier,
            accumulated_iterations=self.logical_batch.iterations,
            expected_batch_size=float(self.expected_batch_size or 0),
        )
        return Mechanism(mechanism.noise_multiplier, bound)

    def _draw_once(self, tensor: torch.Tensor, std: float) -> torch.Tensor:
        """The sum of `tensor` over processes, with noise that the first process draws."""
        own_std = std if self.processes.rank == 0 else 0.0
        return self.processes.total(draw(tensor, own_std, self._noise, self.generator))

    def _leave_grad_sample(self, parameter: nn.Parameter, grad_sample: torch.Tensor) -> None:
        """Set ``parameter.grad_sample``; a list, as Opacus has it, where passes accumulate."""
        earlier = getattr(parameter, "grad_sample", None)
        if self.logical_batch.iterations and earlier is not None:
            earlier = earlier if isinstance(earlier, list) else [earlier]
            parameter.grad_sample = [*earlier, grad_sample]  # type: ignore[attr-defined]
        else:
            parameter.grad_sample = grad_sample  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear gradients; sums of physical batches survive until their logical batch ends.

        A parameter frozen meanwhile is left without a gradient: zeros would let momentum move it.

        Raises:
            RuntimeError: a CUDA graph is being captured, so no stream can wait for gradients.
        """
        refuse_graph_capture("optimizer.zero_grad()")
        self.streams.wait()
        dropped = self.logical_batch.clear()
        for p in self.held_parameters():
            p.grad_sample = None  # type: ignore[attr-defined]
            if dropped:
                p.summed_grad = None  # type: ignore[attr-defined]
        if dropped:
            self.private_sum.clear()
            self.clipping.reset()
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
        refuse_graph_capture("optimizer.step()")
        self.streams.wait()
        if not self.params and self.logical_batch.state is State.FRESH:
            return True
        if self._ahead is None and self._step_skip_queue:
            self._ahead = len(self._step_skip_queue) - 1
        self.logical_batch.refuse_broken()
        if self._check_skip_next_step():
            self.logical_batch.skip()
            return False
        self._follow_cleared_gradients()
        self.logical_batch.check_step(float(self.noise_multiplier), self.held_parameters())
        if self.step_hook:
            self.step_hook(self)
        expected = self._expected_samples(self.logical_batch.iterations)
        self.max_grad_norm = self.clipping.next_bound(self.max_grad_norm, expected, self._draw_once)
        self.logical_batch.stepped()
        return True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_optimizer_") and "original_optimizer" in self.__dict__:
            return getattr(self.original_optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        own = {"logical_batch": copy(self.logical_batch), "private_sum": copy(self.private_sum)}
        anew = {"last_step": None, "_signals_from": None, "_ahead": None, "streams": Streams()}
        return {**self.__dict__, **own, **anew}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
