"""What the optimizer promises of a logical batch, in plain words, and faults to put into it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from hypothesis.stateful import RuleBasedStateMachine, invariant
from torch import nn
from torch.utils.data import TensorDataset

from dpkernels import ops
from dpkernels.layers.operands import LinearOperand
from tests.engine.support import private, values
from tests.engine.truth import microbatching

#: records, and the expected number of them in one backward pass
RECORDS, EXPECTED = 40, 4
LEARNING_RATE = 0.05
NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
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


def squared_error(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A loss that an empty batch has too."""
    return (model(batch[0]) - 0.3).square().sum(1).mean()


class Loop(RuleBasedStateMachine):
    """A private model, its optimizer, what is expected of them, and what holds after every call."""

    #: whether several backward passes may come before one step, and the noise multiplier at first
    accumulation, sigma = False, 0.7

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        #: the same without the engine, for the ground truth
        self.plain = copy.deepcopy(net)
        self.net = net
        self.generator = torch.Generator().manual_seed(5)
        self.engine, self.model, self.optimizer, _ = private(
            net, TensorDataset(values(RECORDS, 3)), EXPECTED, self.sigma,
            poisson_sampling=not self.accumulation, noise_generator=self.generator, memory_budget=0,
        )  # fmt: skip
        self.parameters = dict(net.named_parameters())
        # the trial run, so that it comes in the middle of nothing
        squared_error(self.model, (values(3, 3),)).backward()
        self.optimizer.zero_grad(set_to_none=True)
        #: draws what the engine must have drawn
        self.twin = torch.Generator()
        self.twin.set_state(self.generator.get_state())
        self.batch = LogicalBatch(self.accumulation)
        self.grads: dict[str, torch.Tensor | None] = dict.fromkeys(NAMES)
        self.weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.counted: list[tuple[float, float]] = []
        self.seed = 0
        #: parameters whose ``p.grad`` is that of fewer backward passes than the others'
        self.stale: set[str] = set()

    def trained(self) -> list[str]:
        return [name for name, p in self.parameters.items() if p.requires_grad]

    def cleared(self) -> list[bool]:
        return [self.grads[name] is None for name in self.trained()]

    def records(self, count: int) -> torch.Tensor:
        """Other records at every call; the norms of their gradients lie around the bounds."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(count, 3, dtype=torch.float64, generator=generator) * 2

    def clipped(self, x: torch.Tensor) -> Values:
        """The clipped sum over the records, for each parameter that is trained now."""
        for mine, own in zip(self.plain.parameters(), self.net.parameters(), strict=True):
            mine.data.copy_(own.data)
            mine.requires_grad_(own.requires_grad)
        bound = float(self.optimizer.max_grad_norm)
        return microbatching(
            self.plain, squared_error, (x,), bound, expected_batch_size=1.0
        ).gradients

    def draw(self, like: Values, std: float) -> Values:
        if not std:
            return {name: torch.zeros_like(each) for name, each in like.items()}
        return {
            name: torch.normal(0.0, std, each.shape, generator=self.twin, dtype=each.dtype)
            for name, each in like.items()
        }

    @invariant()
    def noise_was_drawn_once(self) -> None:
        assert torch.equal(self.generator.get_state(), self.twin.get_state())

    @invariant()
    def gradients_are_private(self) -> None:
        for name, p in self.parameters.items():
            expected = self.grads[name]
            if p.grad is None:
                assert expected is None or self.batch.state == "broken", name
            else:
                assert expected is not None, name
                assert torch.allclose(p.grad, expected, rtol=1e-9, atol=1e-12), name
        if self.batch.state == "noised":
            assert self.optimizer.accumulated_iterations == self.batch.iterations

    @invariant()
    def steps_were_counted_once(self) -> None:
        history = [(sigma, rate) for sigma, rate, n in self.engine.accountant.history
                   for _ in range(n)]  # fmt: skip
        assert history == self.counted

    @invariant()
    def weights_moved_by_steps_alone(self) -> None:
        for name, p in self.parameters.items():
            assert torch.allclose(p, self.weights[name], rtol=1e-12, atol=1e-12), name
            self.weights[name] = p.detach().clone()
