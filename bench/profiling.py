"""What the device does in a row of steps, as the profiler sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

_WARM_UP = 3
#: the profiled steps, as the profiler's own label
_STEPS = "steps"
_OPERATOR = "aten::"
#: calls of the CUDA runtime in which the host waits for the GPU
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
#: what the profiler lists beside kernels, copies and fills: the GPU's side of those waits
_NO_WORK = ("Context Sync", "Stream Sync", "Stream Wait", "Event Sync")
_LONGEST = 120
Step = Callable[[], None]


@dataclass(frozen=True)
class Event:
    """What the device did, with its begin and end, seconds."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class Recorded:
    """What the profiler saw of a row of steps.

    Attributes:
        steps: how many.
        events: kernels, copies and fills on a GPU; on a CPU the operators that no other calls.
        waits: how long the host waited in each call of the CUDA runtime that waits, seconds.
    """

    steps: int
    events: list[Event]
    waits: list[float]

    @property
    def busy(self) -> float:
        """Seconds of a step in which at least one event runs."""
        return sum(end - begin for begin, end in self._runs()) / self.steps

    def gaps(self, above: float) -> list[float]:
        """Seconds between events in which none runs, where they are more than `above`."""
        between = (b[0] - a[1] for a, b in pairwise(self._runs()))
        return [gap for gap in between if gap > above]

    def _runs(self) -> list[tuple[float, float]]:
        """Begins and ends of the intervals in which at least one event runs, ascending."""
        runs: list[tuple[float, float]] = []
        for event in sorted(self.events, key=lambda event: event.begin):
            if runs and event.begin <= runs[-1][1]:
                runs[-1] = (runs[-1][0], max(runs[-1][1], event.end))
            else:
                runs.append((event.begin, event.end))
        return runs


def record(step: Step, steps: int, device: torch.device) -> Recorded:
    """What `steps` steps in a row do on the device, after a warm-up, in the profiler's times."""
    on_gpu = device.type == "cuda"
    for _ in range(_WARM_UP):
        step()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    if on_gpu:
        torch.cuda.synchronize(device)
    with profile(activities=kinds) as profiler:
        with record_function(_STEPS):
            for _ in range(steps):
                step()
        if on_gpu:
            torch.cuda.synchronize(device)
    return _recorded(profiler.events() or [], steps, on_gpu)


def _recorded(events: Sequence[FunctionEvent], steps: int, on_gpu: bool) -> Recorded:
    """What of the profiler's events the device did, and where the host waited within the steps."""
    (span,) = (e for e in events if e.name == _STEPS and e.device_type == DeviceType.CPU)
    labels = {e.name for e in events if e.is_user_annotation}  # of ranges, on both sides
    own, waits = [], []
    for event in events:
        begin, end = event.time_range.start * 1e-6, event.time_range.end * 1e-6
        if event.device_type != DeviceType.CPU:
            if event.name not in labels and not event.name.startswith(_NO_WORK):
                own.append(Event(event.name, begin, end))
        elif event.name in _WAITS and event.time_range.end <= span.time_range.end:
            waits.append(end - begin)
        elif not on_gpu and _outermost(event):
            own.append(Event(event.name, begin, end))
    return Recorded(steps, own, waits)


def _outermost(event: FunctionEvent) -> bool:
    """Whether it is an operator that no other operator calls."""
    return event.name.startswith(_OPERATOR) and not any(
        name.startswith(_OPERATOR) for name in _callers(event)
    )


def _callers(event: FunctionEvent) -> Iterator[str]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name


def short(name: str) -> str:
    """A kernel's name without its return type, its arguments and the usual namespaces."""
    for noise in ("void ", "at::native::", "(anonymous namespace)::", "at::cuda::"):
        name = name.replace(noise, "")
    depth = 0
    for index, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:index]
            break
    return name if len(name) <= _LONGEST else name[: _LONGEST - 3] + "..."
