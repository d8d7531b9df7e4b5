"""Interleaved timing: in each round every rival does one step, in rotating order."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

#: rivals beyond this multiple of the ordinary step stop after this many rounds
_SLOW = 2.0
_SLOW_ROUNDS = 2
#: untimed steps before the first round end after this many or after these seconds
_WARM_UP_STEPS = 3
_WARM_UP_SECONDS = 1.0


#: runs a step and returns its wall time and processor time, seconds; the latter None on a GPU
Clock = Callable[[Callable[[], None]], tuple[float, float | None]]


@dataclass
class Samples:
    """Times of one rival, seconds, by round."""

    wall: dict[int, float] = field(default_factory=dict)
    processor: dict[int, float] = field(default_factory=dict)

    def add(self, index: int, wall: float, processor: float | None) -> None:
        """The times of round `index`."""
        self.wall[index] = wall
        if processor is not None:
            self.processor[index] = processor


@dataclass(frozen=True)
class Spread:
    """Median with the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Percentiles by linear interpolation."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return cls(statistics.median(values), fifths[0], fifths[3])


def ratios(times: Mapping[int, float], base: Mapping[int, float]) -> Spread:
    """Time over the base's in the same round."""
    return Spread.of([t / base[i] for i, t in times.items() if i in base])


class HostClock:
    """Wall and processor time of a step on the CPU."""

    def __call__(self, step: Callable[[], None]) -> tuple[float, float | None]:
        wall, processor = time.perf_counter(), time.process_time()
        step()
        return time.perf_counter() - wall, time.process_time() - processor


class DeviceClock:
    """CUDA events around a step, with the L2 cache flushed before it."""

    def __init__(self, device: torch.device):
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(size, 1 << 26), dtype=torch.int8, device=device)
        self._device = device

    def __call__(self, step: Callable[[], None]) -> tuple[float, float | None]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self._device)
        self._flush.zero_()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize(self._device)
        return start.elapsed_time(end) / 1e3, None


def require_working(device: torch.device, after: str) -> None:
    """After an error: is the device still usable?

    Raises:
        RuntimeError: it is a GPU whose context an invalid access has ended; all that is measured
            afterwards would be an error of its own.
    """
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as lost:
            raise RuntimeError(f"{after} left the GPU unusable for this process") from lost


def clock_for(device: torch.device) -> Clock:
    """The clock of this device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()


def interleave(
    steps: Mapping[str, Callable[[], None]],
    clock: Clock,
    *,
    seconds: float,
    least: int,
    most: int,
    base: str = "ordinary",
) -> Iterator[dict[str, Samples]]:
    """Time `steps` for about `seconds`, at least `least` and at most `most` rounds.

    Rivals slower than twice the `base` drop out after two rounds.

    The gate has run each of them once.

    Yields:
        The samples so far, after the warm-up and after every round (always the same object).
    """
    samples = {name: Samples() for name in steps}
    for step in steps.values():
        _warm_up(step)
    yield samples
    names, began = list(steps), time.monotonic()
    for index in range(most):
        if index >= least and time.monotonic() - began > seconds:
            return
        if index >= min(_SLOW_ROUNDS, least):
            limit = _SLOW * statistics.median(samples[base].wall.values())
            names = [n for n in names if statistics.median(samples[n].wall.values()) <= limit]
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].add(index, *clock(steps[name]))
        yield samples


def _warm_up(step: Callable[[], None]) -> None:
    began = time.monotonic()
    for _ in range(_WARM_UP_STEPS):
        step()
        if time.monotonic() - began > _WARM_UP_SECONDS:
            return
