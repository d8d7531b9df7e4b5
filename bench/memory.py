"""Peak memory growth of a step: in a fresh process per case and rival, or by CUDA's allocator."""

from __future__ import annotations

import ctypes
import multiprocessing
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench import cases, models, rivals, timing
from bench.rivals import Privacy

#: steps end after this many, unless another number is asked for, or after these seconds
_STEPS = 3
_SECONDS = 5.0
_MEGA = 1e6
_STATUS = Path("/proc/self/status")
_TIMEOUT_S = 300
#: blocks from this size on go back to the system when freed, so that the resident set is what is
#: in use and not how the heap happened to fragment (mallopt of the GNU C library)
_RETURNED_FROM = 1 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def on_cpu(
    case: cases.Case, rival: rivals.Rival, privacy: Privacy, threads: int, steps: int = _STEPS
) -> float | None:
    """Growth of the resident set at its peak during the first steps, MB; None without /proc.

    The process is forked from a server that has imported everything and computed nothing; `case`
    and `rival` go to it by pickling.

    Args:
        steps: at most; a step that would begin after five seconds is left out.
    """
    if not _STATUS.exists():
        return None
    return in_fresh_process(_measure, (case, rival, privacy, threads, steps), _TIMEOUT_S)


def in_fresh_process(
    function: Callable[..., None], arguments: tuple[Any, ...], limit: float
) -> Any:
    """What `function` sends, called with a connection and `arguments`; None after `limit` seconds.

    None, too, where the process dies.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.memory", "bench.parts.accounting"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(sender, *arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(limit) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


class Growth:
    """Growth of this process' resident set since now; nothing without /proc."""

    def __init__(self) -> None:
        self._before = 0.0
        if _STATUS.exists():
            _STATUS.with_name("clear_refs").write_text("5")
            self._before = _resident("VmRSS")

    def peak_mb(self) -> float | None:
        """At its peak, MB."""
        return (_resident("VmHWM") - self._before) / _MEGA if _STATUS.exists() else None


def on_gpu(step: Callable[[], None], device: torch.device) -> float:
    """Growth of allocated memory at its peak during a step, MB."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / _MEGA


def keep_freed() -> bool:
    """Let this process keep what it frees, as jemalloc would; False without the GNU C library."""
    return _set_allocator({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})


def return_freed() -> bool:
    """Let this process give back every larger block that it frees; see :data:`_RETURNED_FROM`."""
    return _set_allocator({_M_MMAP_THRESHOLD: _RETURNED_FROM})


def _set_allocator(settings: dict[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    accepted = [mallopt(name, value) for name, value in settings.items()]
    return all(accepted)


def _measure(
    sender: Connection,
    case: cases.Case,
    rival: rivals.Rival,
    privacy: Privacy,
    threads: int,
    steps: int,
) -> None:
    return_freed()
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    workload = case.build(timing.CPU)
    _touch_libraries(case, rival, privacy)
    growth = Growth()
    train = rival.prepare(workload, privacy)
    timing.repeat(train, steps, _SECONDS)
    sender.send(growth.peak_mb())


def _touch_libraries(case: cases.Case, rival: rivals.Rival, privacy: Privacy) -> None:
    """One step on a tiny network, so that what is imported on first use is not counted."""
    tiny = replace(
        case,
        make_model=partial(models.Recommender, 16, 2, 4, (4,)),
        make_batch=partial(cases.few_fields, 16, 2, 2),
    )
    rival.prepare(tiny.build(timing.CPU), privacy)()


def _resident(field: str) -> float:
    """A field of this process' status, bytes."""
    line = next(s for s in _STATUS.read_text().splitlines() if s.startswith(field))
    return 1024.0 * int(line.split()[1])
