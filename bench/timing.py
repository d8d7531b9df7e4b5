"""Interleaved timing: in each round every rival does one step, in rotating order."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

#: rivals beyond this multiple of the ordinary step stop after this many rounds
_SLOW = 2.0
_SLOW_ROUNDS = 2
#: what a case is about: never dropped, however slow
KEPT = ("ordinary", "ours")
_BASE = "ordinary"
#: untimed steps before the first round end after this many or after these seconds
_WARM_UP_STEPS = 3
_WARM_UP_SECONDS = 1.0
#: on a GPU: steps between two events; none is added to a row that has taken the host these seconds
_ROW = 5
_ROW_SECONDS = 0.5
#: letters of an error in a row
_LONGEST = 160

CPU = torch.device("cpu")

Step = Callable[[], object]


class GpuLost(RuntimeError):
    """An error has ended the use of the GPU by this process."""


@dataclass(frozen=True)
class Times:
    """Seconds of one step.

    Attributes:
        wall: from its begin to its end.
        processor: processor time of this process; None on a GPU.
        host: until Python had returned from it, so that a step with as much host as wall time is
            bound by its launches, or waits for the GPU; None on a CPU.
    """

    wall: float
    processor: float | None = None
    host: float | None = None


#: runs a step, or several, and returns the times of one
Clock = Callable[[Step], Times]


@dataclass
class Samples:
    """Times of one rival, seconds, by round; `error` where a step of it failed."""

    wall: dict[int, float] = field(default_factory=dict)
    processor: dict[int, float] = field(default_factory=dict)
    host: dict[int, float] = field(default_factory=dict)
    error: Exception | None = None

    def add(self, index: int, times: Times) -> None:
        """The times of round `index`."""
        self.wall[index] = times.wall
        if times.processor is not None:
            self.processor[index] = times.processor
        if times.host is not None:
            self.host[index] = times.host


def spread(values: Sequence[float], *names: str) -> dict[str, float]:
    """Median, 20th and 80th percentile (by linear interpolation) under these names."""
    return dict(zip(names, np.quantile(values, (0.5, 0.2, 0.8)).tolist(), strict=True))


def ratios(times: Mapping[int, float], base: Mapping[int, float]) -> list[float]:
    """Time over the base's in the same round."""
    return [t / base[i] for i, t in times.items() if i in base]


def host_clock(step: Step) -> Times:
    """Wall and processor time of a step on the CPU."""
    wall, processor = time.perf_counter(), time.process_time()
    step()
    return Times(time.perf_counter() - wall, time.process_time() - processor)


class CallClock:
    """A single call between two CUDA events, right behind the flush of the L2 cache.

    The host enters the call while the GPU still flushes, so that a call of one kernel has the
    kernel's time and not that of its launch.
    """

    def __init__(self, device: torch.device):
        self._device, self._flush = device, _flush(device)

    def __call__(self, step: Step) -> Times:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self._device)
        self._flush.zero_()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize(self._device)
        return Times(start.elapsed_time(end) / 1e3)


class RowClock:
    """Steps one right after the other between two CUDA events; times are means over the row.

    A step alone on an idle GPU, behind a flush, would hide the gaps between its kernels: the queue
    fills while the cache is flushed. Here the flush has ended before the row begins, so that the
    host has no lead, and from the second step on each begins as in training. The cache is flushed
    once a row: a step finds in it what the step before left.
    """

    def __init__(self, device: torch.device):
        self._device, self._flush = device, _flush(device)

    def __call__(self, step: Step) -> Times:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        torch.cuda.synchronize(self._device)
        began = time.perf_counter()
        start.record()
        steps = repeat(step, _ROW, _ROW_SECONDS)
        host = time.perf_counter() - began
        end.record()
        torch.cuda.synchronize(self._device)
        return Times(start.elapsed_time(end) / 1e3 / steps, host=host / steps)


def _flush(device: torch.device) -> torch.Tensor:
    """Memory whose writing leaves nothing else in the L2 cache."""
    size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(max(size, 1 << 26), dtype=torch.int8, device=device)


def require_working(device: torch.device, after: str) -> None:
    """After an error: is the device still usable?

    Raises:
        GpuLost: it is a GPU whose context an invalid access has ended; all that is measured
            afterwards would be an error of its own.
    """
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as lost:
            raise GpuLost(f"{after} left the GPU unusable for this process") from lost


def refusal(error: Exception, device: torch.device, what: str) -> str:
    """The status of what failed with an error.

    Raises:
        GpuLost: as :func:`require_working`.
    """
    require_working(device, f"{what}: {error}")
    text = " ".join(str(error).split()) or type(error).__name__
    return f"cannot run: {text if len(text) <= _LONGEST else text[: _LONGEST - 3] + '...'}"


def allow_tf32(allowed: bool) -> None:
    """Let products of float32 matrices and convolutions be TF32 from now on, or forbid it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def clock_for(device: torch.device) -> Clock:
    """The clock for steps on this device."""
    return RowClock(device) if device.type == "cuda" else host_clock


def interleave(
    steps: Mapping[str, Step],
    clock: Clock,
    *,
    seconds: float,
    least: int,
    most: int,
    device: torch.device = CPU,
    begin: Callable[[str], None] = lambda name: None,
) -> Iterator[dict[str, Samples]]:
    """Time `steps` for about `seconds`, at least `least` and at most `most` rounds.

    Rivals slower than twice the ordinary step drop out after two rounds; that and ours never do.
    One whose step fails drops out with its error.

    The gate has run each of them once.

    Args:
        device: where the steps run.
        begin: called with a rival's name before its steps.

    Yields:
        The samples so far, after the warm-up and after every round (always the same object).

    Raises:
        GpuLost: a step has ended the use of the GPU.
        Exception: the ordinary step's own.
    """
    samples = {name: Samples() for name in steps}

    def turn(name: str, work: Callable[[], object]) -> None:
        begin(name)
        try:
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:
            require_working(device, f"{name}: {error}")
            if name == _BASE:
                raise
            samples[name].error = error

    def step(name: str, index: int) -> None:
        samples[name].add(index, clock(steps[name]))

    for name in steps:
        turn(name, partial(repeat, steps[name], _WARM_UP_STEPS, _WARM_UP_SECONDS))
    yield samples
    names, began = list(steps), time.monotonic()
    for index in range(most):
        if index >= least and time.monotonic() - began > seconds:
            return
        names = [n for n in names if samples[n].error is None]
        if index >= min(_SLOW_ROUNDS, least):
            limit = _SLOW * statistics.median(samples[_BASE].wall.values())
            names = [
                n
                for n in names
                if n in KEPT or statistics.median(samples[n].wall.values()) <= limit
            ]
        first = index % len(names)
        for name in names[first:] + names[:first]:
            turn(name, partial(step, name, index))
        yield samples


def repeat(step: Step, most: int, seconds: float) -> int:
    """Take steps, `most` or as many as begin within these seconds; returns how many."""
    began, taken = time.perf_counter(), 0
    while taken < most and time.perf_counter() - began < seconds:
        step()
        taken += 1
    return taken
