"""Argument checks and the dtype rule that all op families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dpkernels.ops.precision import float32_products

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def result_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype of every result and accumulator: float64 if an input is float64, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def require_float(name: str, tensor: torch.Tensor, ndim: int) -> None:
    """Raise unless `tensor` is a dense real floating tensor with `ndim` axes."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name}: dtype {tensor.dtype}, expected one of {FLOAT_DTYPES}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: layout {tensor.layout}, expected a strided tensor")
    if tensor.ndim != ndim:
        raise ValueError(f"{name}: shape {list(tensor.shape)}, expected {ndim} axes")


def require_shape(name: str, tensor: torch.Tensor, expected: list[int]) -> None:
    """Raise unless `tensor` has exactly the `expected` shape."""
    if list(tensor.shape) != expected:
        raise ValueError(f"{name}: shape {list(tensor.shape)}, expected {expected}")


def require_clip_factor(clip_factor: torch.Tensor, batch: int) -> None:
    """Raise unless `clip_factor` is [batch] in float32 or float64 (bf16 factors can exceed C)."""
    require_shape("clip_factor", clip_factor, [batch])
    if clip_factor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"clip_factor: dtype {clip_factor.dtype}, expected float32 or float64")


def check_clipped(check: Callable[..., None]) -> Callable[..., None]:
    """The check of a clipped sum: `check` without the clip factors, and that of the factors.

    Args:
        check: takes two operands with B on the first axis, then whatever the op takes behind them.

    Returns:
        The check of an op that takes clip factors [B] after the two operands.
    """

    def check_all(
        first: torch.Tensor, second: torch.Tensor, clip_factor: torch.Tensor, *rest: Any
    ) -> None:
        check(first, second, *rest)
        require_clip_factor(clip_factor, first.shape[0])

    return check_all


def why_not_exact(kinds: Sequence[str], *operands: torch.Tensor) -> str | None:
    """Why library products on CUDA cannot form norms and clipped sums apart from each other.

    TF32 rounds the operands, and a scaled operand otherwise than the plain one: the norm would not
    be that of the values that are summed. Stored per-sample gradients do not have this problem.

    Args:
        kinds: of the products, as :func:`dpkernels.ops.precision.float32_products` takes them.
        operands: what is multiplied.
    """
    if not operands[0].is_cuda or result_dtype(*operands) != torch.float32:
        return None
    if float32_products("cuda", *kinds) != "ieee":
        return "TF32 is allowed, so a sum of scaled operands is not that of the measured gradients"
    return None


def kept_samples(
    clip_factor: torch.Tensor, *operands: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Drop the samples whose factor is 0, so that 0 * NaN cannot reach a sum over samples.

    Args:
        clip_factor: [B].
        operands: tensors with B on the first axis.

    Returns:
        The factors that are left and the operands' rows that go with them (views when none is 0).
    """
    kept = clip_factor != 0
    if bool(kept.all()):
        return clip_factor, operands
    return clip_factor[kept], tuple(operand[kept] for operand in operands)
