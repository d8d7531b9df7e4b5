"""Convolutions over 1, 2 or 3 spatial axes: per-sample weight gradients and norms.

One set of ops serves the transposed convolution too: its weight gradient is this one with input
and grad_output exchanged. An unfold is never formed (docs/math.md section 2).
"""

from __future__ import annotations

import functools

import torch

from dpkernels.ops.checks import checked_by, require_clip_factor, require_float, result_dtype
from dpkernels.ops.registry import contract


def output_size(input_size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """The number of positions of a window on one axis."""
    return (input_size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _check(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> None:
    if len(weight_shape) not in (3, 4, 5):
        raise ValueError(f"weight_shape={list(weight_shape)}: expected 3 to 5 entries")
    require_float("input", input, len(weight_shape))
    require_float("grad_output", grad_output, len(weight_shape))
    _check_sizes(
        tuple(input.shape),
        tuple(grad_output.shape),
        tuple(weight_shape),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
    )


@functools.lru_cache(maxsize=4096)
def _check_sizes(
    input: tuple[int, ...],
    grad_output: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> None:
    """Check one combination of sizes; a network repeats the same ones in every step."""
    axes = len(weight_shape) - 2
    for name, values, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(values) != axes or min(values) < least:
            raise ValueError(f"{name}={list(values)}: expected {axes} integers >= {least}")
    channels_out, channels_in, *kernel = weight_shape
    if groups < 1 or channels_out % groups:
        raise ValueError(f"groups={groups}: expected a divisor of weight_shape[0]={channels_out}")
    if input[1] != channels_in * groups:
        raise ValueError(
            f"input: {input[1]} channels, expected weight_shape[1] * groups ="
            f" {channels_in * groups}"
        )
    if grad_output[:2] != (input[0], channels_out):
        raise ValueError(
            f"grad_output: shape {list(grad_output)}, expected [{input[0]}, {channels_out}, ...]"
        )
    for axis in range(axes):
        window = (kernel[axis], stride[axis], padding[axis], dilation[axis])
        most = output_size(input[2 + axis], *window)
        if grad_output[2 + axis] > max(most, 0):
            raise ValueError(
                f"grad_output: shape {list(grad_output)} has more positions on spatial axis"
                f" {axis} than input {list(input)} has windows ({most})"
            )


def _check_clipped(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    clip_factor: torch.Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> None:
    _check(input, grad_output, weight_shape, stride, padding, dilation, groups)
    require_clip_factor(clip_factor, input.shape[0])


@contract()
@checked_by(_check)
def conv_grad_sample(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
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
        (input.shape[0], *weight_shape), dtype=result_dtype(input, grad_output)
    )


@contract()
@checked_by(_check)
def conv_norm_sq(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """Squared norm of each sample's weight gradient, without keeping the gradients.

    Args: as :func:`conv_grad_sample`.

    Returns:
        [B], float32 (float64 if an input is), never negative.
    """
    return grad_output.new_empty((input.shape[0],), dtype=result_dtype(input, grad_output))


@contract()
@checked_by(_check_clipped)
def conv_clipped_grad(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    clip_factor: torch.Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """Sum over samples of clip_factor[b] times sample b's weight gradient.

    Args:
        input, grad_output and geometry: as :func:`conv_grad_sample`.
        clip_factor: [B], float32 or float64. A sample whose factor is 0 is left out, even where
            its values are not finite.

    Returns:
        [*weight_shape], float32 (float64 if an input is).
    """
    return grad_output.new_empty(tuple(weight_shape), dtype=result_dtype(input, grad_output))
