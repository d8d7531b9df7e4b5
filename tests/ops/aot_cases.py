"""The layers for which the Triton kernels are compiled ahead of time (tests/ops/aot.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from dpkernels.ops.linear import triton as linear

MODULES = (
    "dpkernels.ops.triton_support",
    "dpkernels.ops.linear.triton",
)


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _linear(dtype: torch.dtype, positions: int = 2048) -> tuple[torch.Tensor, torch.Tensor]:
    return tensor(8, positions, 1024, dtype=dtype), tensor(8, positions, 4096, dtype=dtype)


_FACTOR = tensor(8, dtype=torch.float32)
_HALF, _FULL = torch.bfloat16, torch.float32

CASES: dict[str, Callable[[], object]] = {
    "linear gram, bf16": functools.partial(linear.gram_norm_sq, *_linear(_HALF)),
    "linear gram, fp32": functools.partial(linear.gram_norm_sq, *_linear(_FULL)),
    "linear tile-discard norm, bf16": functools.partial(linear.recompute_norm_sq, *_linear(_HALF)),
    "linear tile-discard norm, fp32": functools.partial(linear.recompute_norm_sq, *_linear(_FULL)),
    "linear gradient and norm, bf16": functools.partial(
        linear.grad_sample_and_norm_sq, *_linear(_HALF)
    ),
    "linear clipped, bf16": functools.partial(linear.linear_clipped_grad, *_linear(_HALF), _FACTOR),
    "linear clipped, one position, bf16": functools.partial(
        linear.linear_clipped_grad, *_linear(_HALF, 1), _FACTOR
    ),
    "linear tile-discard norm, few weights, bf16": functools.partial(
        linear.recompute_norm_sq, tensor(2, 1 << 20, 32), tensor(2, 1 << 20, 32)
    ),
    "linear norm, one position, bf16": functools.partial(linear.linear_norm_sq, *_linear(_HALF, 1)),
}
