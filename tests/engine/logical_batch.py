"""What the optimizer promises of a logical batch, in plain words, and faults to put into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from dpkernels import ops
from dpkernels.layers.operands import LinearOperand

#: what a refused call says unless the logical batch is broken, one pattern for each reason
REFUSALS = "|".join(
    (
        "haven't been cleared since the last optimizer step",
        "not compatible with grad accumulation",
        "no noise, from the backward pass before",
        "change it after optimizer.step",
        "not initialized",
        "step the noise scheduler after optimizer.step",
        "signal_skip_step.* came after backward",
    )
)

Values = dict[str, torch.Tensor]


class Refused(Exception):
    """The optimizer must raise ValueError, and leave everything as it was."""


@dataclass
class LogicalBatch:
    """What the optimizer promises of the logical batch under way.

    Attributes:
        accumulation: whether several backward passes may come before one step.
        state: "fresh" (nobody in it), "accumulating" (a sum without noise), "noised" (the sum and
            its noise are in ``p.grad``), "stepped", "skipped" (a physical batch was stepped that
            is not the last), "broken" (an error left sums half written).
        signals: from ``signal_skip_step``, for the physical batches to come.
        kept: whether ``zero_grad()`` leaves the sum, as physical batches before it were skipped.
        passes: backward passes of the physical batch under way.
        iterations: backward passes in ``p.grad``.
        total: the clipped sum by parameter.
        noise: what was added to it.
        bound: the largest ``max_grad_norm`` of all its backward passes.
        drawn: the noise multiplier that the noise was drawn for.
    """

    accumulation: bool
    state: str = "fresh"
    signals: list[bool] = field(default_factory=list)
    kept: bool = False
    passes: int = 0
    iterations: int = 0
    total: Values = field(default_factory=dict)
    noise: Values = field(default_factory=dict)
    bound: float = 0.0
    drawn: float | None = None

    def check_backward(self, cleared: list[bool], bound: float) -> None:
        """Whether a backward pass may come; `cleared`: which trained parameters have no grad."""
        if self.state == "stepped" and all(cleared):
            self.drop()
        if self.state in ("stepped", "skipped", "broken"):
            raise Refused
        if self.passes and not self.accumulation:
            raise Refused
        if self.state == "noised" and (any(cleared) or bound > self.bound):
            raise Refused

    def add(self, clipped: Values, bound: float, sigma: float, draw: Callable[..., Values]) -> None:
        """A backward pass; the first over a last physical batch draws the noise."""
        self.passes += 1
        self.bound = max(self.bound, bound)
        for name, each in clipped.items():
            self.total[name] = self.total.get(name, 0.0) + each
        if self.signals and self.signals[0]:
            self.state = "accumulating"
            return
        self.iterations += 1
        if self.state != "noised":
            self.state, self.drawn = "noised", sigma
            self.noise = draw(clipped, sigma * self.bound)

    def step(self, cleared: list[bool], sigma: float) -> bool:
        """Whether the wrapped optimizer steps, and the accountant counts."""
        if self.state == "broken":
            raise Refused
        if self.signals and self.signals.pop(0):
            if self.iterations:
                raise Refused
            self.state, self.kept, self.passes = "skipped", True, 0
            return False
        if self.state == "stepped" and all(cleared):
            self.drop()
        if self.state != "noised" or sigma != self.drawn:
            raise Refused
        self.state, self.kept, self.passes = "stepped", False, 0
        return True

    def zero_grad(self) -> None:
        """The sum of skipped physical batches stays, unless it is broken."""
        if self.kept and self.state != "broken":
            self.state = "accumulating"
        else:
            self.drop()

    def drop(self) -> None:
        """Begin anew; signals stay, as they are for the physical batches to come."""
        self.__init__(self.accumulation, signals=self.signals)  # type: ignore[misc]


class Interrupted(BaseException):
    """What a fault that is put in raises: no Exception, as Ctrl-C is none."""


@contextmanager
def failing(place: str, call: int) -> Iterator[list[int]]:
    """The `call`-th call of a function raises; the list counts the calls that were made.

    Args:
        place: "sum" (of one parameter), "finish" (all are summed), "noise" (of one parameter).
        call: 1 for the first.
    """
    owner, name = {
        "sum": (LinearOperand, "clipped_grad"),
        "finish": (ops, "finish_grads_"),
        "noise": (torch, "normal"),
    }[place]
    real, calls = getattr(owner, name), [0]

    def function(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and place != "finish":
            raise Interrupted
        result = real(*args, **kwargs)
        if calls[0] == call:
            raise Interrupted
        return result

    with mock.patch.object(owner, name, function):
        yield calls
