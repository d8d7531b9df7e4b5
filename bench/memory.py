"""Peak memory growth of a step: in a fresh process per case and rival, or by CUDA's allocator."""

from __future__ import annotations

import ctypes
import multiprocessing
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench import cases, models, rivals
from bench.rivals import Privacy

#: steps end after this many or after these seconds
_STEPS = 3
_SECONDS = 5.0
_MEGA = 1e6
_STATUS = Path("/proc/self/status")
_TIMEOUT_S = 300
#: blocks from this size on go back to the system when freed, so that the resident set is what is
#: in use and not how the heap happened to fragment (mallopt of the GNU C library)
_RETURNED_FROM = 1 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def on_cpu(case: cases.Case, rival: rivals.Rival, privacy: Privacy, threads: int) -> float | None:
    """Growth of the resident set at its peak during the first steps, MB; None without /proc.

    The process is forked from a server that has imported everything and computed nothing.
    """
    if not _STATUS.exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.memory"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_measure, args=(sender, case.name, rival.name, privacy, threads)
    )
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(_TIMEOUT_S) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


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


def _set_allocator(settings: dict[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    accepted = [mallopt(name, value) for name, value in settings.items()]
    return all(accepted)


def _measure(sender, case: str, rival: str, privacy: Privacy, threads: int) -> None:
    _set_allocator({_M_MMAP_THRESHOLD: _RETURNED_FROM})
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    device = torch.device("cpu")
    chosen = next(r for r in rivals.RIVALS if r.name == rival)
    workload = cases.find([case], "")[0].build(device)
    _touch_libraries(workload.case, chosen, privacy)
    _STATUS.with_name("clear_refs").write_text("5")
    before = _resident("VmRSS")
    train = chosen.prepare(workload, privacy)
    began = time.monotonic()
    for _ in range(_STEPS):
        train()
        if time.monotonic() - began > _SECONDS:
            break
    sender.send((_resident("VmHWM") - before) / _MEGA)


def _touch_libraries(case: cases.Case, rival: rivals.Rival, privacy: Privacy) -> None:
    """One step on a tiny network, so that what is imported on first use is not counted."""
    tiny = replace(
        case,
        make_model=partial(models.Recommender, 16, 2, 4, (4,)),
        make_batch=partial(cases.few_fields, 16, 2, 2),
    )
    rival.prepare(tiny.build(torch.device("cpu")), privacy)()


def _resident(field: str) -> float:
    """A field of this process' status, bytes."""
    line = next(s for s in _STATUS.read_text().splitlines() if s.startswith(field))
    return 1024.0 * int(line.split()[1])
