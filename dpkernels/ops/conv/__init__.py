"""Convolutions over 1, 2 or 3 spatial axes: per-sample weight gradients and norms.

One set of ops serves the transposed convolution too: its weight gradient is this one with input
and grad_output exchanged. An unfold is never formed (docs/math.md section 2).
"""

from __future__ import annotations

import torch

from dpkernels.ops.checks import check_clipped, require_float, result_dtype
from dpkernels.ops.conv.geometry import Geometry, check_sizes
from dpkernels.ops.registry import contract


def _check(input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry) -> None:
    weight_shape = geometry.weight_shape
    if len(weight_shape) not in (3, 4, 5):
        raise ValueError(f"weight_shape={list(weight_shape)}: expected 3 to 5 entries")
    require_float("input", input, len(weight_shape))
    require_float("grad_output", grad_output, len(weight_shape))
    check_sizes(tuple(input.shape), tuple(grad_output.shape), geometry)


@contract(check=_check)
def conv_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """Per-sample weight gradients of a convolution.

    Args:
        input: [B, Cin, *S], float16/bfloat16/float32/float64, any strides. S may be larger than
            the windows of `grad_output` reach; what no window reaches does not count.
        grad_output: [B, Cout, *S'], the gradient at the layer's output.
        weight_shape: [Cout, Cin / groups, *kernel].
        stride: one integer per spatial axis.
        padding: one integer per spatial axis: zeros on both sides (a rule pads `input` itself for
            asymmetric or non-zero padding).
        dilation: one integer per spatial axis.
        groups: a divisor of Cin and Cout.

    Returns:
        [B, *weight_shape], contiguous, float32 (float64 if an input is).

    Raises:
        ValueError: shapes, dtypes or geometry do not fit.
    """
    return grad_output.new_empty(
        (input.shape[0], *geometry.weight_shape), dtype=result_dtype(input, grad_output)
    )


@contract(check=_check)
def conv_norm_sq(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """Squared norm of each sample's weight gradient, without keeping the gradients.

    Args: as :func:`conv_grad_sample`.

    Returns:
        [B], float32 (float64 if an input is), never negative.
    """
    return grad_output.new_empty((input.shape[0],), dtype=result_dtype(input, grad_output))


@contract(check=check_clipped(_check))
def conv_clipped_grad(
    input: torch.Tensor, grad_output: torch.Tensor, clip_factor: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """Sum over samples of clip_factor[b] times sample b's weight gradient.

    Args:
        input, grad_output and geometry: as :func:`conv_grad_sample`.
        clip_factor: [B], float32 or float64. A sample whose factor is 0 is left out, even where
            its values are not finite.

    Returns:
        [*weight_shape], float32 (float64 if an input is).
    """
    return grad_output.new_empty(geometry.weight_shape, dtype=result_dtype(input, grad_output))
