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
    return _sums(normalized, grad_output)[0]


affine_norm_sq = norm_sq_by(affine_grad_sample)
affine_clipped_grad = clipped_grad_by(affine_grad_sample)


def bias_grad_sample(grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    return _sums(None, grad_output)[0]


def normalization_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """See the contract."""
    return _sums(input, grad_output, (mean, rstd), mean.shape[1])


def normalization_last_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """See the contract."""
    return _sums(input.transpose(1, 2), grad_output.transpose(1, 2), (mean, rstd))


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


def _sums(
    input: torch.Tensor | None,
    grad_output: torch.Tensor,
    statistics: Sequence[torch.Tensor] = (),
    groups: int | None = None,
) -> torch.Tensor:
    """Run the kernel on [B, C, T] operands of any strides and dtypes.

    Args:
        input: what the scale multiplies before normalisation; None for the shift alone.
        grad_output: [B, C, T].
        statistics: mean and rstd to normalise by, [B, groups] or [B, T]; none for the scale alone.
        groups: of channels with common statistics; None where a statistic belongs to a position.

    Returns:
        [outputs, B, C]: the scale's gradients, then the shift's.
    """
    batch, channels, positions = grad_output.shape
    operands = [each for each in (input, grad_output) if each is not None]
    wide = result_dtype(*operands)
    common = grad_output.dtype if operands[0].dtype == grad_output.dtype else wide
    if statistics:
        channels_last = groups is None
    else:
        channels_last = grad_output.stride(1) == 1 and grad_output.stride(2) != 1
    rows = [each.transpose(1, 2) if channels_last else each for each in operands]
    rows = [native.features_adjacent(each.to(common)) for each in rows]
    inputs, grads = rows[0], rows[-1]
    prepared = [each.detach().to(wide).contiguous() for each in statistics]
    scale, shift = input is not None, input is None or bool(statistics)
    results = grads.new_empty((scale + shift, batch, channels), dtype=wide)
    native.extension(grads).affine_grads(
        inputs.data_ptr(),
        grads.data_ptr(),
        native.dtype_code(common),
        *([each.data_ptr() for each in prepared] or (0, 0)),
        results[0].data_ptr() if scale else 0,
        results[-1].data_ptr() if shift else 0,
        (
            batch,
            channels,
            positions,
            groups or 1,
            inputs.stride()[:2],
            grads.stride()[:2],
            channels_last,
        ),
        native.launch_on(grads),
    )
    return results
