"""One logical batch: noise exactly once, and counted, whatever a training loop calls in what order.

A state machine of hypothesis drives a private model and its optimizer, and a model of the logical
batch in plain words beside them. ``DPKERNELS_LOGICAL_BATCHES=5000`` tries that many courses instead
of the fixed few, and shortens one that fails, which takes minutes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.engine.logical_batch import (
    EXPECTED,
    LEARNING_RATE,
    NAMES,
    RECORDS,
    REFUSALS,
    Interrupted,
    Loop,
    Refused,
    failing,
    squared_error,
)

#: whether errors are put into the middle of the sums
FAULTS = True
#: whether the noise multiplier changes between the backward pass that drew the noise and the step
RESCHEDULES = True


def _in_order(machine: TrainingLoop) -> bool:
    """Whether a backward pass may follow: not if noise was drawn and the next signal is to skip."""
    batch = machine.batch
    return not (batch.state == "noised" and batch.signals and batch.signals[0])


def _may_zero(machine: TrainingLoop) -> bool:
    """Whether ``zero_grad()`` may follow: not between the last physical batch and its step."""
    return not (machine.batch.state == "noised" and machine.batch.kept)


class TrainingLoop(Loop):
    """Calls of a training loop in any order, each checked against :class:`LogicalBatch`."""

    def backward(self, x: torch.Tensor | None) -> None:
        """A backward pass over the records `x`; None makes the gradient private by noise alone."""

        def run() -> None:
            if x is None:
                self.optimizer.make_private_noise_only()
            else:
                squared_error(self.model, (x,)).backward()

        before = self.batch.state
        bound, sigma = float(self.optimizer.max_grad_norm), float(self.optimizer.noise_multiplier)
        clipped = self.clipped(torch.zeros(0, 3, dtype=torch.float64) if x is None else x)
        try:
            self.check_backward()
        except Refused:
            self.refuses(run)
            return
        if self.batch.state == "noised" and sigma != self.batch.drawn:
            # the optimizer may refuse here or in step(), where the model refuses in any case
            try:
                run()
            except ValueError:
                return
        else:
            run()
        self.batch.add(clipped, bound, sigma, self.draw)
        if self.batch.state != "noised":
            return
        if before == "noised":
            self.stale |= {name for name in NAMES if self.grads[name] is not None}
        for name in clipped:
            self.stale.discard(name)
            noisy = self.batch.total[name] + self.batch.noise[name]
            self.grads[name] = noisy / (EXPECTED * self.batch.iterations)

    def check_backward(self) -> None:
        stepped = self.batch.state == "stepped"
        try:
            self.batch.check_backward(self.cleared(), float(self.optimizer.max_grad_norm))
        finally:
            if stepped and self.batch.state == "fresh":
                self.cleared_to(True)

    def refuses(self, call: Callable[[], Any]) -> None:
        broken = self.batch.state == "broken"
        with pytest.raises(ValueError, match="broken" if broken else REFUSALS):
            call()

    def cleared_to(self, set_to_none: bool) -> None:
        """Expect what ``zero_grad`` leaves: a frozen parameter has no gradient in either way."""
        self.stale.clear()
        for name, p in self.parameters.items():
            grad = self.grads[name]
            kept = not set_to_none and grad is not None and p.requires_grad
            self.grads[name] = torch.zeros_like(p) if kept else None

    @precondition(lambda self: len(self.batch.signals) < 2)
    @rule(skip=st.booleans())
    def signals(self, skip: bool) -> None:
        """A loop over physical batches signals before each backward pass."""
        if self.batch.state == "noised" and not self.batch.signals:
            skip = False  # signals_too_late() has the other case
        self.optimizer.signal_skip_step(skip)
        self.batch.signals.append(skip)

    @precondition(lambda self: self.batch.state == "noised" and not self.batch.signals)
    @rule()
    def signals_too_late(self) -> None:
        self.optimizer.signal_skip_step(True)
        self.batch.signals.append(True)
        self.steps()

    @precondition(_in_order)
    @rule(count=st.integers(0, 3))
    def goes_backward(self, count: int) -> None:
        self.backward(self.records(count))

    @precondition(_in_order)
    @rule()
    def goes_on_without_records(self) -> None:
        self.backward(None)

    @precondition(_in_order)
    @rule(count=st.integers(1, 3))
    def meets_a_record_that_is_not_finite(self, count: int) -> None:
        """The optimizer raises before it adds anything, so that other records may follow."""
        x = self.records(count)
        x[-1] = float("nan")
        say = rf"sample {count - 1} .* not finite"
        try:
            self.check_backward()
        except Refused:
            say += "|" + REFUSALS
        with pytest.raises(ValueError, match="broken" if self.batch.state == "broken" else say):
            squared_error(self.model, (x,)).backward()

    @precondition(_in_order)
    @rule(
        count=st.integers(1, 3), place=st.sampled_from(["sum", "finish", "noise"]),
        call=st.integers(1, 2),
    )  # fmt: skip
    def fails_while_sums_are_written(self, count: int, place: str, call: int) -> None:
        """Ctrl-C, or too little memory, when some parameters' sums hold the records already."""
        x = self.records(count)
        weights = sum(name.endswith("weight") for name in self.trained())
        most = {"sum": weights, "finish": 1, "noise": len(self.trained())}[place]
        quiet = self.optimizer.noise_multiplier == 0.0 or self.batch.state == "noised"
        if place == "noise" and (quiet or (self.batch.signals and self.batch.signals[0])):
            return
        if not most or not FAULTS:
            return
        try:
            self.check_backward()
        except Refused:
            self.refuses(squared_error(self.model, (x,)).backward)
            return
        if self.batch.state == "noised" and self.optimizer.noise_multiplier != self.batch.drawn:
            return
        loss = squared_error(self.model, (x,))
        with failing(place, min(call, most)) as calls, pytest.raises(Interrupted):
            loss.backward()
        assert calls == [min(call, most)]
        self.batch.state = "broken"
        self.twin.set_state(self.generator.get_state())

    @rule()
    def steps(self) -> None:
        before = {name: p.detach().clone() for name, p in self.parameters.items()}
        stepped, cleared = self.batch.state == "stepped", self.cleared()
        sigma = float(self.optimizer.noise_multiplier)
        try:
            counts = self.batch.step(cleared, sigma)
        except Refused:
            self.refuses(self.optimizer.step)
            if stepped and self.batch.state == "fresh":
                self.cleared_to(True)
            if self.batch.state == "broken":
                self.follow_signals()
            return
        self.optimizer.step()
        if counts:
            self.counted.append((sigma, EXPECTED / RECORDS * self.batch.iterations))
            for name, grad in self.grads.items():
                if grad is not None:
                    self.weights[name] = before[name] - LEARNING_RATE * grad

    @precondition(_may_zero)
    @rule(set_to_none=st.booleans(), of=st.sampled_from(["optimizer", "model"]))
    def zeroes(self, set_to_none: bool, of: str) -> None:
        {"optimizer": self.optimizer, "model": self.model}[of].zero_grad(set_to_none=set_to_none)
        broken = self.batch.state == "broken"
        self.batch.zero_grad()
        self.cleared_to(set_to_none)
        if broken:
            self.follow_signals()

    def follow_signals(self) -> None:
        """A broken logical batch may take its signals along, or leave them to what comes."""
        left = list(self.optimizer._step_skip_queue)
        assert left in ([], self.batch.signals, self.batch.signals[1:])
        self.batch.signals[:] = left

    @precondition(lambda self: self.batch.state in ("noised", "stepped"))
    @rule()
    def clears_by_hand(self) -> None:
        """The wrapped model's own ``zero_grad()`` tells the optimizer nothing."""
        self.net.zero_grad(set_to_none=True)
        self.grads = dict.fromkeys(NAMES)
        self.stale.clear()

    @rule(name=st.sampled_from(NAMES))
    def freezes_or_unfreezes(self, name: str) -> None:
        """One parameter; the last that is trained stays so.

        An optimizer with nothing to train steps as an ordinary one. A parameter that was frozen
        while other parameters accumulated stays frozen until its gradient is cleared.
        """
        parameter = self.parameters[name]
        if parameter.requires_grad and self.trained() == [name]:
            return
        if not parameter.requires_grad and name in self.stale:
            return
        parameter.requires_grad_(not parameter.requires_grad)
        if self.batch.state not in ("noised", "stepped", "broken"):
            parameter.grad = self.grads[name] = None

    @rule(bound=st.sampled_from([0.5, 1.0, 2.0]), sigma=st.sampled_from([0.7, 1.4]))
    def follows_schedulers(self, bound: float, sigma: float) -> None:
        """Schedulers set the bound and the noise multiplier, also between two backward passes."""
        self.optimizer.max_grad_norm = bound
        if self.optimizer.noise_multiplier and (RESCHEDULES or self.batch.state != "noised"):
            self.optimizer.noise_multiplier = sigma

    @precondition(_may_zero)
    @rule(
        sizes=st.lists(st.integers(0, 3), min_size=1, max_size=3),
        fault=st.sampled_from([None, "nan", "sum", "finish"]), bound=st.sampled_from([0.5, 1.0]),
        name=st.none() | st.sampled_from(NAMES),
    )  # fmt: skip
    def takes_physical_batches(
        self, sizes: list[int], fault: str | None, bound: float, name: str | None
    ) -> None:
        """Physical batches as ``BatchMemoryManager`` cuts them.

        Calls that are drawn one by one come through a whole logical batch too rarely.

        Args:
            sizes: of the physical batches.
            fault: what happens in the backward pass over the last.
            bound: what a scheduler sets after the first.
            name: what is frozen or unfrozen after the first, and back after the last.
        """
        self.zeroes(set_to_none=False, of="optimizer")
        for _ in range(len(self.batch.signals)):
            self.steps()
        for place, size in enumerate(sizes, 1):
            last = place == len(sizes)
            self.zeroes(set_to_none=False, of="optimizer")
            self.signals(not last)
            if last and fault == "nan":
                self.meets_a_record_that_is_not_finite(2)
            if last and fault in ("sum", "finish"):
                self.fails_while_sums_are_written(2, fault, 2)
            else:
                self.backward(self.records(size))
            self.gradients_are_private()
            if place == 1 and name:
                self.freezes_or_unfreezes(name)
            if place == 1 and not last:
                self.follows_schedulers(bound, float(self.optimizer.noise_multiplier))
            self.steps()
        if name:
            self.freezes_or_unfreezes(name)

    @precondition(_may_zero)
    @rule(
        sizes=st.lists(st.integers(0, 3), min_size=2, max_size=3),
        bound=st.sampled_from([0.5, 1.0, 2.0]), sigma=st.sampled_from([0.7, 1.4]),
    )  # fmt: skip
    def accumulates(self, sizes: list[int], bound: float, sigma: float) -> None:
        """Backward passes over `sizes` records; schedulers set the rest after the first."""
        self.zeroes(set_to_none=True, of="model")
        for _ in range(len(self.batch.signals)):
            self.steps()
        self.zeroes(set_to_none=True, of="model")
        for place, size in enumerate(sizes):
            self.backward(self.records(size))
            self.gradients_are_private()
            if place == 0:
                self.follows_schedulers(bound, sigma)
        self.steps()


class AccumulatingLoop(TrainingLoop):
    """Without Poisson sampling, so that backward passes may accumulate."""

    accumulation = True


class LoopWithoutNoise(AccumulatingLoop):
    """Likewise, with nothing to add to the sums."""

    sigma = 0.0


COURSES = os.environ.get("DPKERNELS_LOGICAL_BATCHES")
FEW = settings(
    max_examples=int(COURSES or 25),
    stateful_step_count=40,
    deadline=None,
    derandomize=COURSES is None,
    phases=set(Phase) if COURSES else {Phase.generate},
)
TestPoisson, TestAccumulation = TrainingLoop.TestCase, AccumulatingLoop.TestCase
TestPoisson.settings = TestAccumulation.settings = FEW
TestWithoutNoise = LoopWithoutNoise.TestCase
TestWithoutNoise.settings = settings(FEW, max_examples=int(COURSES or 10))
