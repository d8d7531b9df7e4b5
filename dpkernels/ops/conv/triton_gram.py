"""`channel_gram` in Triton: a convolution's gradient norm from Grams over channels only.

norm_sq = sum_{t,s} <g_t, g_s> * sum_k <a_{t+k}, a_{s+k}> (docs/math.md section 2). The first kernel
writes the input's Gram over channels; the second forms a tile of grad_output's Gram in registers
and multiplies it by the box sum of the first, gathered tap by tap. Pairs of tiles t <= s only. For
small images: the first Gram is in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dpkernels.ops import triton_support as support
from dpkernels.ops.conv.geometry import Geometry
from dpkernels.ops.triton_support import tile_gram, tile_pair

SCRATCH_ELEMENTS = 1 << 25
BOX_COST = 200
"""Time of gathering one float32 from the cache, in floating-point operations of the matrix unit.

An estimate (4 bytes at 5 TB/s against a few hundred TFLOP/s), not a measurement.
"""
TILE = 64
DEPTH = 32
WARPS = 8


@triton.jit
def _offset(at, size_h, size_w, step_d, step_h, step_w):
    """Where position `at` of a volume lies."""
    return at // (size_h * size_w) * step_d + at // size_w % size_h * step_h + at % size_w * step_w


@triton.jit
def conv_channel_gram_kernel(
    input, gram, pairs, groups, positions, size_h, size_w, channels,
    i_sample, i_channel, i_d, i_h, i_w,
    TILE: tl.constexpr, DEPTH: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gram[sample, group] = <a_p, a_q> for all input positions p and q."""
    place = (tl.program_id(0) // pairs).to(tl.int64)
    low, high = tile_pair(tl.program_id(0) % pairs)
    rows = low * TILE + tl.arange(0, TILE)
    columns = high * TILE + tl.arange(0, TILE)
    base = input + place // groups * i_sample + place % groups * channels * i_channel
    tile = tile_gram(
        base, rows, columns,
        _offset(rows, size_h, size_w, i_d, i_h, i_w),
        _offset(columns, size_h, size_w, i_d, i_h, i_w),
        positions, channels, i_channel, TILE, DEPTH, DTYPE, PRECISION,
    )  # fmt: skip
    gram += place * positions * positions
    inside = (rows < positions)[:, None] & (columns < positions)[None, :]
    tl.store(gram + rows[:, None] * positions + columns[None, :], tile, mask=inside)
    if low != high:
        tl.store(gram + columns[None, :] * positions + rows[:, None], tile, mask=inside)


@triton.jit
def _seen(at, size_h, size_w, in_d, in_h, in_w, stride_d, stride_h, stride_w, kd, kh, kw):
    """The input position that output position `at` sees through one tap, and whether it exists."""
    d = at // (size_h * size_w) * stride_d + kd
    h = at // size_w % size_h * stride_h + kh
    w = at % size_w * stride_w + kw
    exists = (d >= 0) & (d < in_d) & (h >= 0) & (h < in_h) & (w >= 0) & (w < in_w)
    return (d * in_h + h) * in_w + w, exists


@triton.jit
def conv_box_norm_kernel(
    grads, gram, partials, pairs, groups, positions, out_h, out_w, in_d, in_h, in_w, channels,
    g_sample, g_channel, g_d, g_h, g_w,
    stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w,
    KERNEL_D: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partials[sample, group, pair] = the share of one pair of tiles in the squared norm."""
    place = (tl.program_id(0) // pairs).to(tl.int64)
    pair = tl.program_id(0) % pairs
    low, high = tile_pair(pair)
    rows = low * TILE + tl.arange(0, TILE)
    columns = high * TILE + tl.arange(0, TILE)
    base = grads + place // groups * g_sample + place % groups * channels * g_channel
    tile = tile_gram(
        base, rows, columns,
        _offset(rows, out_h, out_w, g_d, g_h, g_w),
        _offset(columns, out_h, out_w, g_d, g_h, g_w),
        positions, channels, g_channel, TILE, DEPTH, DTYPE, PRECISION,
    )  # fmt: skip
    inputs = in_d * in_h * in_w
    gram += place * inputs * inputs
    box = tl.zeros([TILE, TILE], tl.float32)
    for tap in range(KERNEL_D * KERNEL_H * KERNEL_W):
        kd = tap // (KERNEL_H * KERNEL_W) * dilation_d - pad_d
        kh = tap // KERNEL_W % KERNEL_H * dilation_h - pad_h
        kw = tap % KERNEL_W * dilation_w - pad_w
        row, row_exists = _seen(
            rows, out_h, out_w, in_d, in_h, in_w, stride_d, stride_h, stride_w, kd, kh, kw
        )
        column, column_exists = _seen(
            columns, out_h, out_w, in_d, in_h, in_w, stride_d, stride_h, stride_w, kd, kh, kw
        )
        row_exists &= rows < positions
        column_exists &= columns < positions
        box += tl.load(
            gram + row[:, None] * inputs + column[None, :],
            mask=row_exists[:, None] & column_exists[None, :],
            other=0.0,
        )
    share = tl.sum(tile * box)
    tl.store(partials + place * pairs + pair, tl.where(low == high, share, 2.0 * share))


def is_cheaper(input_shape: torch.Size, grad_shape: torch.Size, geometry: Geometry) -> bool:
    """Whether the Gram form takes less time than forming the gradient, by the count of one sample.

    Half of two Grams and of the gathered box sums, against 2 * positions * weights.
    """
    positions, inputs = grad_shape[2:].numel(), input_shape[2:].numel()
    taps = torch.Size(geometry.kernel).numel()
    grams = inputs**2 * input_shape[1] + positions**2 * grad_shape[1]
    boxes = BOX_COST * taps * geometry.groups * positions**2 // 2
    fits = geometry.groups * inputs**2 <= SCRATCH_ELEMENTS
    return fits and grams + boxes < 2 * positions * geometry.weights


def channel_gram_norm_sq(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry, precision: str
) -> torch.Tensor:
    """Squared norms [B] of operands and geometry with three spatial axes; none may be empty.

    Works on a few samples at a time: scratch is SCRATCH_ELEMENTS, or one sample's Gram where that
    is larger.
    """
    inputs = input.shape[2:].numel()
    chunk = max(1, SCRATCH_ELEMENTS // (geometry.groups * inputs**2))
    parts = [
        _norm_sq(seen, grad, geometry, precision)
        for seen, grad in zip(input.split(chunk), grad_output.split(chunk), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _norm_sq(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry, precision: str
) -> torch.Tensor:
    batch, groups = input.shape[0], geometry.groups
    channels_in, channels_out = geometry.channels
    inputs, positions = input.shape[2:].numel(), grad_output.shape[2:].numel()
    gram = torch.empty((batch, groups, inputs, inputs), dtype=torch.float32, device=input.device)
    side = support.power_of_two(inputs, TILE)
    pairs = _pairs(inputs, side)
    with torch.cuda.device_of(input):
        conv_channel_gram_kernel[(batch * groups * pairs,)](
            input.detach(), gram, pairs, groups, inputs, *input.shape[3:], channels_in,
            *input.stride(),
            TILE=side, DEPTH=DEPTH, DTYPE=support.common_dtype(input), PRECISION=precision,
            num_warps=WARPS,
        )  # fmt: skip
        side = support.power_of_two(positions, TILE)
        pairs = _pairs(positions, side)
        partials = gram.new_empty((batch, groups * pairs))
        conv_box_norm_kernel[(batch * groups * pairs,)](
            grad_output.detach(), gram, partials, pairs, groups, positions,
            *grad_output.shape[3:], *input.shape[2:], channels_out,
            *grad_output.stride(),
            *geometry.stride, *geometry.padding, *geometry.dilation, *geometry.kernel,
            TILE=side, DEPTH=DEPTH, DTYPE=support.common_dtype(grad_output), PRECISION=precision,
            num_warps=WARPS,
        )  # fmt: skip
    return support.sum_rows(partials)


def _pairs(size: int, tile: int) -> int:
    count = triton.cdiv(size, tile)
    return count * (count + 1) // 2
