"""Fingerprints on the CPU (csrc/cpu/fingerprint.cpp): one pass over memory."""

from __future__ import annotations

import torch

from dpkernels.ops import native
from dpkernels.ops.fingerprints.runs import runs_of

unavailable = native.why_not_cpu

#: ``Element`` in csrc/include/dpkernels/fingerprint.h
_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.bool: 4,
    torch.uint8: 4,
    torch.int8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
}


def fingerprint(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract."""
    tensor, *shape = runs_of(rows)
    bits = torch.empty((shape[0], 2), dtype=torch.int64)
    moments = torch.empty((shape[0], 3), dtype=torch.float64)
    native.extension(tensor).fingerprint(
        tensor.data_ptr(),
        _CODES[tensor.dtype],
        bits.data_ptr(),
        moments.data_ptr(),
        tuple(shape),
        native.launch_on(tensor),
    )
    return bits, moments
