"""The optimizer whose gradients are private before ``step()`` is called."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
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
from dpkernels.engine.release.loss_scale import warn_of_overflow
from dpkernels.engine.release.noisy_sum import ReleasingOptimizer
from dpkernels.engine.release.pending import ParameterGradient, PendingGradients
from dpkernels.engine.release.records import Mechanism, StepCounter, StepReport


class FusedDPOptimizer(ReleasingOptimizer):
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
            clipping=strategy,
            processes=Processes() if processes is None else processes,
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
        self._is_last_step_skipped = False
        self.grad_accumulation_allowed = True
        self._consumed = False
        #: backward passes since the last ``step()``
        self._passes = 0
        #: the generator that signals where logical batches end
        self._signals_from: FrameType | None = None
        #: how many signals it is ahead of the steps, as its loader fetches; None before the first
        self._ahead: int | None = None

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

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Say whether the next physical batch is not the last of its logical batch.

        ``BatchMemoryManager`` signals from a generator. When another one takes over, the loop has
        left the first half-way: what that began is dropped, as it would end in another batch's sum.

        Raises:
            ValueError: a physical batch had no step, so its signal would go to the next one.
        """
        caller = sys._getframe(1)
        if caller.f_code.co_flags & CO_GENERATOR:
            if caller is not self._signals_from:
                if self._signals_from is not None:
                    self._abandon()
                self._signals_from, self._ahead = caller, None
            elif self._ahead is not None and len(self._step_skip_queue) > self._ahead:
                raise ValueError(
                    "BatchMemoryManager: a physical batch was passed over without "
                    "optimizer.step(), so logical batches would end elsewhere than they were "
                    "drawn; step for each, after make_private_noise_only() instead of backward() "
                    "where there is nothing to learn from"
                )
        super().signal_skip_step(do_skip)

    def _abandon(self) -> None:
        """Drop a logical batch that is under way, and the signals for the rest of it."""
        self._step_skip_queue.clear()
        if self._is_last_step_skipped:
            self._is_last_step_skipped = False
            self.zero_grad(set_to_none=True)

    def held_parameters(self) -> list[nn.Parameter]:
        """Every parameter of every group, also those that are frozen now."""
        return [p for group in self.original_optimizer.param_groups for p in group["params"]]

    def privatize(self, gradients: PendingGradients) -> None:
        """Clip, sum, add noise, into ``p.grad``: called at the end of each backward pass.

        Raises:
            ValueError: a gradient is not finite, or an earlier one was not consumed or cleared.
        """
        if not self.params:
            return
        self._check_cleared()
        self._note_devices()
        factors = self._clip(gradients)
        self._passes += 1
        self._release({} if gradients.empty else gradients.gradients, factors)

    def make_private_noise_only(self) -> None:
        """The gradient of an empty batch: noise alone, as the mechanism demands.

        For training loops that skip the forward pass when Poisson sampling draws nobody; follow it
        with ``step()``, which counts.
        """
        refuse_graph_capture("make_private_noise_only()")
        self.processes.check_noise_only()
        self._check_cleared()
        self._passes += 1
        self.last_step = None
        self._note_devices()
        self.streams.gather()
        self._release({}, {})
        self.streams.complete()

    def _note_devices(self) -> None:
        """Noise is added on every device, also where no contribution was formed."""
        for device in {p.device for p in self.params}:
            self.streams.note(device)

    def _check_cleared(self) -> None:
        cleared = all(p.grad is None for p in self.params)
        if self._consumed and cleared and not self._is_last_step_skipped:
            self.zero_grad(set_to_none=True)
        if self._consumed:
            raise ValueError(
                "Gradients haven't been cleared since the last optimizer step. In order to obtain "
                "privacy guarantees you must call optimizer.zero_grad() on each step"
            )
        if self._passes and not self.grad_accumulation_allowed:
            raise ValueError(
                "Poisson sampling is not compatible with grad accumulation. You need to call "
                "optimizer.step() after every forward/backward pass or consider using "
                "BatchMemoryManager"
            )

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
        norm_sq = [self._norm_sq(gradient) for gradient in gradients.gradients.values()]
        if not norm_sq or gradients.empty:
            self.last_step = None
            return {}
        total = total_norm_sq(torch._foreach_mul(norm_sq, scale**2))
        if self.drops_overflow():
            warn_of_overflow(total)
        else:
            gradients.refuse_not_finite(total)
        bounds = [gradient.bound_sq() for gradient in gradients.gradients.values()]
        bound_sq = dict(zip(gradients.gradients, torch._foreach_mul(bounds, scale**2), strict=True))
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

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear gradients; sums of physical batches survive until their logical batch ends.

        A parameter that was frozen meanwhile has none, not zeros that momentum would follow.

        Raises:
            RuntimeError: a CUDA graph is being captured, whose stream can wait for no gradient.
        """
        refuse_graph_capture("optimizer.zero_grad()")
        self.streams.wait()
        for p in self.held_parameters():
            p.grad_sample = None  # type: ignore[attr-defined]
        if not self._is_last_step_skipped:
            for p in self.held_parameters():
                p.summed_grad = None  # type: ignore[attr-defined]
            self._passes = 0
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
        refuse_graph_capture("optimizer.step()")
        self.streams.wait()
        if not any(p.requires_grad for p in self.params):
            return True
        if self._ahead is None and self._step_skip_queue:
            self._ahead = len(self._step_skip_queue) - 1
        if self._check_skip_next_step():
            if self._iterations:
                raise ValueError(
                    "signal_skip_step() came after backward(), which had already added the noise; "
                    "call it before the backward pass of a physical batch that is not the last"
                )
            self._is_last_step_skipped = True
            self._consumed = True
            self._passes = 0
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
        self._passes = 0
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

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_optimizer_") and "original_optimizer" in self.__dict__:
            return getattr(self.original_optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.update(
            _private={}, last_step=None, _signals_from=None, _ahead=None, streams=Streams()
        )
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
