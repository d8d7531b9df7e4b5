"""The state of a logical batch, and the calls that may come next; no other module keeps either.

One step of the mechanism draws one logical batch (privacy). A logical batch may be run as several
physical batches (memory), each in a backward pass of its own. The backward pass over the last
physical batch adds the noise, and the next ``step()`` counts the mechanism.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import nn

from dpkernels.engine.release.records import Mechanism

_SIGNAL_TOO_LATE = (
    "signal_skip_step() came after backward(), which had already added the noise; call it before "
    "the backward pass of a physical batch that is not the last"
)


class State(Enum):
    """Where a logical batch stands; see :class:`LogicalBatch`."""

    FRESH = "fresh"
    ACCUMULATING = "accumulating"
    SKIPPED = "skipped"
    NOISED = "noised"
    STEPPED = "stepped"
    BROKEN = "broken"


class LogicalBatch:
    """The states of a logical batch, and the calls that lead from one to another.

    ============ ======================== ============================ ========= ==============
    state        what is held             ``backward()``               ``step()``  ``zero_grad()``
    ============ ======================== ============================ ========= ==============
    FRESH        nothing                  ACCUMULATING; last: NOISED   SKIPPED   FRESH
    ACCUMULATING clipped sums, no noise   ACCUMULATING; last: NOISED   SKIPPED   FRESH, or stays
    SKIPPED      the same                 refused                      SKIPPED   ACCUMULATING
    NOISED       private ``p.grad``       last: NOISED                 STEPPED   FRESH
    STEPPED      the same, counted        refused                      refused   FRESH
    BROKEN       sums written in part     refused                      refused   FRESH
    ============ ======================== ============================ ========= ==============

    "last" is the backward pass over the last physical batch. ``signal_skip_step()`` announces that
    the step of any other physical batch is to be skipped; without the signal a step is refused in
    every state but NOISED. Sums whose step was skipped outlive ``zero_grad()`` until their logical
    batch ends ("or stays"). A second pass in NOISED adds to ``p.grad`` and draws no noise. Any
    exception while sums are written makes the logical batch BROKEN: some sums hold the samples,
    others do not, so the logical batch can only be dropped. A copy of an unfinished logical batch
    is BROKEN too.

    Attributes:
        state: see above.
        iterations: number of last physical batches whose sums ``p.grad`` holds; 0 before NOISED.
        passes: number of backward passes since the last ``step()``, skipped ones included, or
            since the sums were dropped.
        carried: whether the sums hold physical batches whose step was skipped.
        mechanism: noise multiplier and largest bound of the passes so far, on the last physical
            batch those of all processes; None before the first pass.
        private: by parameter, the gradient that the engine wrote, and that gradient's version.
    """

    def __init__(self) -> None:
        self._drop()

    def _drop(self) -> None:
        self.state = State.FRESH
        self.iterations = 0
        self.passes = 0
        self.carried = False
        self.mechanism: Mechanism | None = None
        self.private: dict[nn.Parameter, tuple[torch.Tensor, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        own = self.state in (State.FRESH, State.STEPPED)
        state = self.state if own else State.BROKEN
        return {**self.__dict__, "state": state, "private": {}}

    def was_cleared_by_hand(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether the gradients of the last step are gone without ``optimizer.zero_grad()``."""
        return self.state is State.STEPPED and all(p.grad is None for p in parameters)

    def check_backward(
        self, parameters: Sequence[nn.Parameter], *, last: bool, accumulation_allowed: bool
    ) -> None:
        """Raise ``ValueError`` where no backward pass may come next."""
        self.refuse_broken()
        self._refuse_uncleared()
        if self.passes and not accumulation_allowed:
            raise ValueError(
                "Poisson sampling is not compatible with grad accumulation. You need to call "
                "optimizer.step() after every forward/backward pass or consider using "
                "BatchMemoryManager"
            )
        if self.state is State.NOISED and not last:
            raise ValueError(_SIGNAL_TOO_LATE)
        if self.state is State.NOISED and not all(map(self._holds_its_noise, parameters)):
            raise ValueError(
                "backward(): a parameter has no gradient, so no noise, from the backward pass "
                "before, or another one: it was cleared, changed or unfrozen while accumulating; "
                "call optimizer.zero_grad()"
            )

    def mechanism_with(self, noise_multiplier: float, bound: float) -> Mechanism:
        """The mechanism once the pass under way is added; nothing is noted before.

        Args:
            noise_multiplier: of the pass, and so of the mechanism.
            bound: C of the pass; the mechanism has the largest bound so far.

        Raises:
            ValueError: the noise is already drawn, for another noise multiplier or a smaller bound.
        """
        if self.mechanism is not None:
            if self.state is State.NOISED:
                self._check_noise(self.mechanism, noise_multiplier)
                if bound > self.mechanism.bound:
                    raise ValueError(
                        f"max_grad_norm={bound}: it was {self.mechanism.bound} in the backward "
                        "pass that drew the noise; change it after optimizer.step(), not while "
                        "accumulating"
                    )
            bound = max(bound, self.mechanism.bound)
        return Mechanism(noise_multiplier, bound)

    def begin_writing(self, mechanism: Mechanism) -> None:
        """Sums change from here on: the logical batch is BROKEN until :meth:`wrote` is called."""
        self.state, self.mechanism = State.BROKEN, mechanism

    def wrote(self, gradients: Mapping[nn.Parameter, torch.Tensor], *, last: bool) -> None:
        """A backward pass is complete: its sums hold its samples.

        Args:
            gradients: by parameter, the new ``p.grad``; empty before the last physical batch.
            last: whether the pass was over the last physical batch.
        """
        self.passes += 1
        self.iterations += last
        self.private.update({p: (g, g._version) for p, g in gradients.items()})
        self.state = State.NOISED if last else State.ACCUMULATING

    def skip(self) -> None:
        """Pass over the step of a physical batch that is not the last.

        Raises:
            ValueError: the noise is already drawn, so the physical batch was the last.
        """
        if self.iterations:
            raise ValueError(_SIGNAL_TOO_LATE)
        self.state, self.carried, self.passes = State.SKIPPED, True, 0

    def check_step(self, noise_multiplier: float, parameters: Iterable[nn.Parameter]) -> None:
        """Raise ``ValueError`` where a step would use gradients that are not private.

        Args:
            noise_multiplier: the noise multiplier with which the step will be counted.
            parameters: every parameter of the optimizer.
        """
        self._refuse_uncleared()
        if self.mechanism is None or self.state is not State.NOISED:
            raise ValueError(
                "Per sample gradient is not initialized. Not updated in backward pass? "
                "Call loss.backward() on the private model before optimizer.step()"
            )
        self._check_noise(self.mechanism, noise_multiplier)
        for p in parameters:
            if p.grad is not None and p.grad is not self.private.get(p, (None,))[0]:
                raise ValueError(
                    f"optimizer.step(): the gradient of a parameter of shape {tuple(p.shape)} was "
                    "not made private by the engine; leave p.grad as backward() wrote it (in-place "
                    "changes are allowed), and call zero_grad() before backward()"
                )

    def abandon(self) -> bool:
        """The loop has moved on: no sample of an unfinished logical batch may go into the next.

        Returns:
            Whether the logical batch was unfinished, so that :meth:`clear` will drop the sums.
        """
        half_way = self.carried or self.state is State.ACCUMULATING
        self.state = State.BROKEN if half_way else self.state
        return half_way

    def stepped(self) -> None:
        """The gradient was used and counted."""
        self.state, self.carried, self.passes = State.STEPPED, False, 0

    def clear(self) -> bool:
        """``zero_grad()``: drop the sums, unless they wait for the end of their logical batch.

        Returns:
            Whether the sums are to be dropped.
        """
        waiting = self.carried and self.state in (State.SKIPPED, State.ACCUMULATING)
        if waiting:
            self.state = State.ACCUMULATING
        else:
            self._drop()
        return not waiting

    def _holds_its_noise(self, parameter: nn.Parameter) -> bool:
        """Whether ``p.grad`` is what the last backward pass wrote, bit for bit."""
        gradient, version = self.private.get(parameter, (None, 0))
        return gradient is not None and parameter.grad is gradient and gradient._version == version

    def _check_noise(self, drawn: Mechanism, noise_multiplier: float) -> None:
        """Raise where the noise was drawn for a noise multiplier other than `noise_multiplier`."""
        if drawn.noise_multiplier != noise_multiplier:
            raise ValueError(
                f"noise_multiplier={noise_multiplier}: the noise was drawn in backward() with "
                f"{drawn.noise_multiplier}; step the noise scheduler after optimizer.step()"
            )

    def refuse_broken(self) -> None:
        """Raise ``ValueError`` where the logical batch can only be dropped."""
        if self.state is State.BROKEN:
            raise ValueError(
                "optimizer: its logical batch is broken, so some sums hold samples that others do "
                "not: a backward pass failed while sums were written, or the optimizer was copied "
                "half-way; call optimizer.zero_grad(), which drops the whole logical batch"
            )

    def _refuse_uncleared(self) -> None:
        if self.state in (State.STEPPED, State.SKIPPED):
            raise ValueError(
                "Gradients haven't been cleared since the last optimizer step. In order to obtain "
                "privacy guarantees you must call optimizer.zero_grad() on each step"
            )
