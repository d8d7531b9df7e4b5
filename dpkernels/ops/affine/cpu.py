"""Gradients of scales and shifts on the CPU (csrc/cpu/affine.cpp): one pass over the operands.

The kernel takes positions last or channels last, as the operands' strides are; they are copied only
where neither fits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpkernels.ops import native
from dpkernels.ops.checks import result_dtype
from dpkernels.ops.from_gradients import clipped_grad_by, norm_sq_by

unavailable = native.why_not_cpu


def affine_grad_sample(normalized: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    return _without_statistics(normalized, grad_output)


affine_norm_sq = norm_sq_by(affine_grad_sample)
affine_clipped_grad = clipped_grad_by(affine_grad_sample)


def bias_grad_sample(grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    return _without_statistics(grad_output)


def normalization_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """See the contract."""
    return _run((input, grad_output), False, (mean, rstd), mean.shape[1])


def normalization_last_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """See the contract."""
    return _run((input, grad_output), True, (mean, rstd))


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


def _without_statistics(*operands: torch.Tensor) -> torch.Tensor:
    """[B, C] of [B, C, T] operands in any layout."""
    channels_last = operands[-1].stride(1) == 1 and operands[-1].stride(2) != 1
    if channels_last:
        operands = tuple(operand.transpose(1, 2) for operand in operands)
    return _run(operands, channels_last)[0]


def _run(
    operands: Sequence[torch.Tensor],
    channels_last: bool,
    statistics: Sequence[torch.Tensor] = (),
    groups: int = 1,
) -> torch.Tensor:
    """Call the kernel with operands of one dtype and a contiguous last axis.

    Args:
        operands: what the scale multiplies and grad_output; for the shift alone, grad_output.
        channels_last: whether operands are [B, T, C], not [B, C, T].
        statistics: mean and rstd, [B, T] with channels last and [B, groups] else; none to leave
            the input as it is, and the shift out.
        groups: of channels with common statistics.

    Returns:
        [outputs, B, C]: the scale's gradients, then the shift's.
    """
    wide = result_dtype(*operands)
    common = operands[0].dtype if operands[0].dtype == operands[-1].dtype else wide
    rows = [native.features_adjacent(operand.to(common)) for operand in operands]
    inputs, grads = rows[0], rows[-1]
    batch, channels, positions = grads.shape
    if channels_last:
        channels, positions = positions, channels
    outputs = 2 if statistics else 1
    results = grads.new_empty((outputs, batch, channels), dtype=wide)
    first = results.data_ptr()
    last = first + (results.nbytes // 2 if statistics else 0)
    prepared = [each.detach().to(wide).contiguous() for each in statistics]
    sizes = batch, channels, positions, groups
    native.extension(grads).affine_grads(
        inputs.data_ptr(),
        grads.data_ptr(),
        native.dtype_code(common),
        *([each.data_ptr() for each in prepared] or (0, 0)),
        first if len(rows) == 2 else 0,
        last if statistics or len(rows) == 1 else 0,
        (*sizes, inputs.stride()[:2], grads.stride()[:2], channels_last),
        native.launch_on(grads),
    )
    return results
