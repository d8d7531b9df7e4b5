"""Gradients of scales and shifts on the CPU (csrc/cpu/affine.cpp): one pass over the operands.

There is a kernel for positions last and one for channels last; each op takes the one that fits its
operands' strides, and copies only where neither does.
"""

from __future__ import annotations

import torch

from dpkernels.ops import native
from dpkernels.ops.checks import result_dtype
from dpkernels.ops.from_gradients import clipped_grad_by, norm_sq_by

unavailable = native.why_not_cpu


def affine_grad_sample(normalized: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    result = _empty(grad_output, normalized)
    return _reduce(normalized, grad_output, result, None)


affine_norm_sq = norm_sq_by(affine_grad_sample)
affine_clipped_grad = clipped_grad_by(affine_grad_sample)


def bias_grad_sample(grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    return _reduce(grad_output, grad_output, None, _empty(grad_output))


def normalization_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """See the contract."""
    batch, channels, positions = grad_output.shape
    result = _empty(grad_output, input, 2)
    sizes = (batch, channels, positions, mean.shape[1])
    _run("channel_grads", input, grad_output, (mean, rstd), (result[0], result[1]), sizes)
    return result


def normalization_last_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """See the contract."""
    batch, positions, channels = grad_output.shape
    result = _empty(grad_output.transpose(1, 2), input, 2)
    sizes = (batch, channels, positions, 1)
    _run("position_grads", input, grad_output, (mean, rstd), (result[0], result[1]), sizes)
    return result


def normalization_statistics(input: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """See the contract."""
    batch, channels, positions = input.shape
    rows = input.detach().contiguous()
    result = rows.new_empty((2, batch, groups), dtype=result_dtype(rows))
    native.extension(rows).row_statistics(
        rows.data_ptr(),
        native.dtype_code(rows.dtype),
        result[0].data_ptr(),
        result[1].data_ptr(),
        batch * groups,
        channels // groups * positions,
        eps,
        native.launch_on(rows),
    )
    return result


def _empty(
    grad_output: torch.Tensor, input: torch.Tensor | None = None, *leading: int
) -> torch.Tensor:
    """Room for results [*leading, B, C] of [B, C, T] operands."""
    dtype = result_dtype(grad_output if input is None else input, grad_output)
    return grad_output.new_empty((*leading, *grad_output.shape[:2]), dtype=dtype)


def _reduce(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Fill `weight` or `bias` from [B, C, T] operands of any layout, without statistics."""
    sizes = (*grad_output.shape, 1)
    kernel = "channel_grads"
    if grad_output.stride(1) == 1 and grad_output.stride(2) != 1:
        kernel = "position_grads"
        input, grad_output = input.transpose(1, 2), grad_output.transpose(1, 2)
    _run(kernel, input, grad_output, (None, None), (weight, bias), sizes)
    return bias if weight is None else weight  # type: ignore[return-value]


def _run(
    kernel: str,
    input: torch.Tensor,
    grad_output: torch.Tensor,
    statistics: tuple[torch.Tensor | None, torch.Tensor | None],
    results: tuple[torch.Tensor | None, torch.Tensor | None],
    sizes: tuple[int, ...],
) -> None:
    """Call a kernel with operands of one dtype and a contiguous last axis."""
    wide = result_dtype(input, grad_output)
    common = input.dtype if input.dtype == grad_output.dtype else wide
    inputs, grads = (native.features_adjacent(each.to(common)) for each in (input, grad_output))
    prepared = [None if s is None else s.detach().to(wide).contiguous() for s in statistics]
    getattr(native.extension(grads), kernel)(
        inputs.data_ptr(),
        inputs.stride()[:2],
        grads.data_ptr(),
        grads.stride()[:2],
        native.dtype_code(common),
        *(0 if each is None else each.data_ptr() for each in (*prepared, *results)),
        sizes,
        native.launch_on(grads),
    )
