"""Room for results of many megabytes, in huge pages where the system offers them.

Per-sample gradients go back to the system at the end of every step and are taken anew in the next.
In pages of 4 KiB the system's share of that is as long as writing them several times over; in
pages of 2 MiB a fifth of it (bench/NOTES.md). Linux gives huge pages to those who ask.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence

import torch

HUGE_PAGE = 1 << 21
"""Bytes of a huge page on most machines; smaller results are left alone."""

_MADV_HUGEPAGE = 14


def new_empty(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """As ``like.new_empty(shape)``, for a result that will be written as a whole."""
    result = like.new_empty(tuple(shape))
    size = result.numel() * result.element_size()
    if size >= HUGE_PAGE and result.device.type == "cpu" and _advise is not None:
        begin = result.data_ptr() // HUGE_PAGE * HUGE_PAGE
        end = -(-(result.data_ptr() + size) // HUGE_PAGE) * HUGE_PAGE
        _advise(begin, end - begin, _MADV_HUGEPAGE)
    return result


def _madvise() -> Callable[[int, int, int], int] | None:
    """The system's call; a hint that it does not take changes nothing."""
    if not sys.platform.startswith("linux"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


_advise = _madvise()
