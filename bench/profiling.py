"""Where a rival's step spends more than the ordinary one: by operator, and by Python function."""

from __future__ import annotations

import cProfile
import pstats
import statistics
from collections import defaultdict
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

_WARM_UP = 3
Step = Callable[[], None]


def by_operator(steps: dict[str, Step], rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Median own time per operator and step, ms, by rival; the rivals take turns.

    Kernels that are called without torch's dispatcher count for the operator that calls them.
    """
    for step in steps.values():
        for _ in range(_WARM_UP):
            step()
    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in steps}
    kinds = [ProfilerActivity.CPU]
    if device == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    own = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    for _ in range(rounds):
        for name, step in steps.items():
            with profile(activities=kinds) as profiler:
                step()
            for event in profiler.key_averages():
                times[name][event.key].append(getattr(event, own) / 1e3)
    return {
        name: {key: statistics.median(values) for key, values in operators.items()}
        for name, operators in times.items()
    }


def extra(
    operators: dict[str, dict[str, float]], rival: str
) -> list[tuple[str, float, float, float]]:
    """Operator, ordinary ms, rival's ms, difference: the largest differences first."""
    base, own = operators["ordinary"], operators[rival]
    rows = [
        (key, base.get(key, 0.0), own.get(key, 0.0), own.get(key, 0.0) - base.get(key, 0.0))
        for key in base.keys() | own.keys()
    ]
    return sorted(rows, key=lambda row: -abs(row[3]))


def by_function(step: Step, rounds: int) -> list[tuple[str, float]]:
    """Own time per Python or native function and step, ms, longest first."""
    profiler = cProfile.Profile()
    for _ in range(rounds):
        profiler.enable()
        step()
        profiler.disable()
    rows = [
        (f"{file.rpartition('/')[2]}:{line} {function}", 1e3 * entry[2] / rounds)
        for (file, line, function), entry in pstats.Stats(profiler).stats.items()
    ]
    return sorted(rows, key=lambda row: -row[1])
