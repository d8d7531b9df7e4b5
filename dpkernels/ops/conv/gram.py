"""`channel_gram`: a convolution's gradient norm from Grams over channels only.

norm_sq = sum_{t,s} <g_t, g_s> * sum_k <a_{t+k}, a_{s+k}>. The inner sum over taps is a box sum of
shifted diagonals of the input's Gram over channels, taken axis by axis (docs/math.md section 2).
"""

from __future__ import annotations

import math

import torch

from dpkernels.ops.conv.geometry import Geometry

SCRATCH_ELEMENTS = 1 << 21
BOX_COST = 16
"""Time of one element of a box sum, a pass over memory, in floating-point operations of a GEMM."""


def gram_flops(input_shape: torch.Size, grad_shape: torch.Size, geometry: Geometry) -> float:
    """Floating-point operations of one sample's Gram norm; infinite where it would not fit.

    Two Grams, and the box sums: one pass per tap and axis over the widest array.
    """
    positions, inputs = grad_shape[2:].numel(), input_shape[2:].numel()
    widest = geometry.groups * max(positions, inputs) ** 2
    if widest > SCRATCH_ELEMENTS:
        return math.inf
    grams = 2.0 * (inputs**2 * input_shape[1] + positions**2 * grad_shape[1])
    return grams + BOX_COST * sum(geometry.kernel) * widest


def gradient_flops(grad_shape: torch.Size, geometry: Geometry) -> float:
    """Floating-point operations of one sample's gradient."""
    return 2.0 * grad_shape[2:].numel() * geometry.weights


def is_cheaper(input_shape: torch.Size, grad_shape: torch.Size, geometry: Geometry) -> bool:
    """Whether the Gram form needs fewer operations than forming the gradient."""
    return gram_flops(input_shape, grad_shape, geometry) < gradient_flops(grad_shape, geometry)


def channel_gram_norm_sq(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """Squared norms [B]; operands float32 or float64.

    Works on a few samples at a time: scratch is a small multiple of SCRATCH_ELEMENTS, or of one
    sample's Gram where that is larger.
    """
    widest = max(input.shape[2:].numel(), grad_output.shape[2:].numel())
    chunk = max(1, SCRATCH_ELEMENTS // max(1, geometry.groups * widest**2))
    parts = [
        _box_gram(seen, grad.shape[2:], geometry).mul_(_gram(grad, geometry.groups)).sum((1, 2, 3))
        for seen, grad in zip(input.split(chunk), grad_output.split(chunk), strict=True)
    ]
    return torch.cat(parts).clamp_(min=0)


def _gram(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, C, *S] -> [B, groups, T, T], inner products over a group's channels."""
    rows = tensor.reshape(tensor.shape[0], groups, tensor.shape[1] // groups, -1)
    return rows.transpose(2, 3) @ rows


def _box_gram(input: torch.Tensor, spatial: torch.Size, geometry: Geometry) -> torch.Tensor:
    """sum_k <a_{t+k}, a_{s+k}> for all output positions: [B, groups, T, T]."""
    axes, groups = geometry.axes, geometry.groups
    sizes = input.shape[2:]
    gram = _gram(input, groups).view(input.shape[0], groups, *sizes, *sizes)
    for axis in range(axes):
        left, right = 2 + axis, 2 + axes + axis
        shape = list(gram.shape)
        shape[left] = shape[right] = spatial[axis]
        total = gram.new_zeros(shape)
        for tap in range(geometry.kernel[axis]):
            offset = tap * geometry.dilation[axis] - geometry.padding[axis]
            out, seen = _overlap(offset, geometry.stride[axis], sizes[axis], spatial[axis])
            window = gram[_at(left, seen)][_at(right, seen)]
            total[_at(left, out)][_at(right, out)] += window
        gram = total
    positions = spatial.numel()
    return gram.reshape(input.shape[0], groups, positions, positions)


def _at(axis: int, part: slice) -> tuple[slice, ...]:
    return (*[slice(None)] * axis, part)


def _overlap(offset: int, stride: int, size: int, positions: int) -> tuple[slice, slice]:
    """Output positions t with 0 <= t * stride + offset < size, and the inputs that they see."""
    first = max(0, -(offset // stride))
    last = min(positions, (size - 1 - offset) // stride + 1)
    if last <= first:
        return slice(0, 0), slice(0, 0)
    start = first * stride + offset
    return slice(first, last), slice(start, start + (last - first - 1) * stride + 1, stride)
