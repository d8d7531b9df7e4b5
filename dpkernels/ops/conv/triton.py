"""Triton kernels for convolutions of 1, 2 and 3 spatial axes (docs/math.md section 2).

The per-sample weight gradient is an implicit matrix product: output channels by (input channel,
tap), summed over output positions, the input gathered where each tap reads it and nothing
unfolded. The sample is in the grid; a long sum over positions is spread over slots by a fixed
table and the slots are added in order. One and two axes are three with axes of size one in front.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from dpkernels.ops import triton_support as support
from dpkernels.ops.conv import triton_gram
from dpkernels.ops.conv.geometry import Geometry
from dpkernels.ops.triton_support import Jobs, Tile

unavailable = support.unavailable

GRADIENT = {2: Tile(128, 64, 32, 8, 3), 4: Tile(64, 64, 32, 8, 3)}
"""By the operands' bytes per element. Many rows: each gathered number is used once per row."""


@triton.jit
def conv_gradient_kernel(
    input, grads, factor, out, squares, jobs, slots, chunks, chunk,
    positions, out_h, out_w, in_d, in_h, in_w, channels_in, channels_out, groups,
    i_sample, i_channel, i_d, i_h, i_w,
    g_sample, g_channel, g_d, g_h, g_w,
    stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w,
    KERNEL_D: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    PADDED_D: tl.constexpr, PADDED_H: tl.constexpr, PADDED_W: tl.constexpr,
    CHANNELS_FASTEST: tl.constexpr,
    WEIGHTED: tl.constexpr, STORE: tl.constexpr, SQUARE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[slot] = the sum of its jobs; a job is one chunk of one sample's output positions.

    Slots are jobs for per-sample gradients. A clipped sum has fewer: slot, slot + slots, ...
    """
    taps: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    columns = channels_in * taps
    wide = tl.cdiv(columns, COLUMNS)
    high = tl.cdiv(channels_out, ROWS)
    tiles = groups * high * wide
    slot = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    group = (tile // (high * wide)).to(tl.int64)
    row = tile // wide % high * ROWS + tl.arange(0, ROWS)
    column = tile % wide * COLUMNS + tl.arange(0, COLUMNS)
    if CHANNELS_FASTEST:
        channel = column % channels_in
        tap = column // channels_in
    else:
        channel = column // taps
        tap = column % taps
    shift_d = tap // (KERNEL_H * KERNEL_W) * dilation_d - pad_d
    shift_h = tap // KERNEL_W % KERNEL_H * dilation_h - pad_h
    shift_w = tap % KERNEL_W * dilation_w - pad_w
    input += group * channels_in * i_channel
    grads += group * channels_out * g_channel
    reach = channel * i_channel + shift_d * i_d + shift_h * i_h + shift_w * i_w
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for job in range(slot, jobs, slots):
        sample = (job // chunks).to(tl.int64)
        first = (job % chunks).to(tl.int32) * chunk
        last = tl.minimum(first + chunk, positions)
        weight = 1.0
        if WEIGHTED:
            weight = tl.load(factor + sample).to(tl.float32)
        if weight != 0.0:
            gradient = tl.zeros([ROWS, COLUMNS], tl.float32)
            for start in range(first, last, DEPTH):
                at = start + tl.arange(0, DEPTH)
                d = at // (out_h * out_w)
                h = at // out_w % out_h
                w = at % out_w
                left = tl.load(
                    grads
                    + sample * g_sample
                    + row[:, None] * g_channel
                    + (d * g_d + h * g_h + w * g_w)[None, :],
                    mask=(row < channels_out)[:, None] & (at < last)[None, :],
                    other=0.0,
                )
                d *= stride_d
                h *= stride_h
                w *= stride_w
                exists = (at < last)[:, None] & (column < columns)[None, :]
                if PADDED_D:
                    seen = d[:, None] + shift_d[None, :]
                    exists &= (seen >= 0) & (seen < in_d)
                if PADDED_H:
                    seen = h[:, None] + shift_h[None, :]
                    exists &= (seen >= 0) & (seen < in_h)
                if PADDED_W:
                    seen = w[:, None] + shift_w[None, :]
                    exists &= (seen >= 0) & (seen < in_w)
                right = tl.load(
                    input
                    + sample * i_sample
                    + ((d * i_d + h * i_h + w * i_w)[:, None] + reach[None, :]),
                    mask=exists,
                    other=0.0,
                )
                gradient = tl.dot(
                    left.to(DTYPE), right.to(DTYPE), gradient, input_precision=PRECISION
                )
            total += weight * gradient
    if STORE:
        weights = group * channels_out + row
        at = (channel * taps + tap)[None, :] + weights[:, None] * columns
        tl.store(
            out + slot * groups * channels_out * columns + at,
            total,
            mask=(row < channels_out)[:, None] & (column < columns)[None, :],
        )
    if SQUARE:
        tl.store(squares + slot * tiles + tile, tl.sum(total * total))


def why_not(input: torch.Tensor, grad_output: torch.Tensor, *rest: object) -> str | None:
    """Why these operands are not for Triton."""
    return support.why_not(input, grad_output)


def conv_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """See the contract."""
    return _per_sample(input, grad_output, geometry, store=True, square=False)[0]


def grad_sample_and_norm_sq(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-sample gradients [B, *weight_shape] and, from the same values, squared norms [B]."""
    return _per_sample(input, grad_output, geometry, store=True, square=True)


def conv_norm_sq(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """See the contract. Gram over channels for small images, else each tile of the gradient."""
    if input.numel() == 0 or grad_output.numel() == 0:
        return support.zeros(input, input.shape[0])
    if triton_gram.is_cheaper(input.shape, grad_output.shape, geometry):
        return channel_gram_norm_sq(input, grad_output, geometry)
    return recompute_norm_sq(input, grad_output, geometry)


def channel_gram_norm_sq(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """Squared norms [B] from Grams over channels. No operand may be empty."""
    return triton_gram.channel_gram_norm_sq(
        *_volumes(input, grad_output, geometry), support.input_precision("conv")
    )


def recompute_norm_sq(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """Each tile of the gradient formed, squared, summed and discarded: [B]."""
    return _per_sample(input, grad_output, geometry, store=False, square=True)[1]


def conv_clipped_grad(
    input: torch.Tensor, grad_output: torch.Tensor, clip_factor: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """See the contract. Each sample's gradient in float32 as the norm saw it, then its factor."""
    if input.numel() == 0 or grad_output.numel() == 0:
        return support.zeros(input, *geometry.weight_shape)
    run = functools.partial(_gradient, input, grad_output, geometry)
    positions = grad_output.shape[2:].numel()
    total = support.clipped_sum(run, clip_factor, positions, geometry.weights)
    return total.view(geometry.weight_shape)


def _per_sample(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry, store: bool, square: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, positions = input.shape[0], grad_output.shape[2:].numel()
    shape = (batch, *geometry.weight_shape)
    if input.numel() == 0 or grad_output.numel() == 0:
        return support.zeros(input, *shape), support.zeros(input, batch)
    run = functools.partial(_gradient, input, grad_output, geometry)
    grads, norm_sq = support.per_sample(run, batch, positions, geometry.weights, store, square)
    return grads.view(shape) if store else grads, norm_sq


def _gradient(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry, jobs: Jobs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the gradient kernel."""
    factor, slots, chunks, chunk, store, square = jobs
    input, grad_output, geometry = _volumes(input, grad_output, geometry)
    channels_in, channels_out = geometry.channels
    columns = geometry.weights // (channels_out * geometry.groups)
    tile = GRADIENT[max(input.element_size(), grad_output.element_size())]
    rows = support.power_of_two(channels_out, tile.rows)
    width = support.power_of_two(columns, tile.columns)
    tiles = geometry.groups * triton.cdiv(channels_out, rows) * triton.cdiv(columns, width)
    out = support.empty(input, *((slots, geometry.weights) if store else (0,)))
    squares = support.empty(input, *((slots, tiles) if square else (0, 0)))
    with torch.cuda.device_of(input):
        conv_gradient_kernel[(slots * tiles,)](
            input.detach(), grad_output.detach(), out if factor is None else factor, out, squares,
            input.shape[0] * chunks, slots, chunks, chunk,
            grad_output.shape[2:].numel(), *grad_output.shape[3:], *input.shape[2:],
            channels_in, channels_out, geometry.groups,
            *input.stride(), *grad_output.stride(),
            *geometry.stride, *geometry.padding, *geometry.dilation, *geometry.kernel,
            *(width > 0 for width in geometry.padding),
            CHANNELS_FASTEST=input.stride(1) == 1 and channels_in > 1,
            WEIGHTED=factor is not None, STORE=store, SQUARE=square,
            ROWS=rows, COLUMNS=width, DEPTH=tile.depth,
            DTYPE=support.common_dtype(input, grad_output),
            PRECISION=support.input_precision("conv"),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, squares


def _volumes(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> tuple[torch.Tensor, torch.Tensor, Geometry]:
    """The same convolution with three spatial axes."""
    ones, zeros = (1,) * (3 - geometry.axes), (0,) * (3 - geometry.axes)
    for _ in ones:
        input, grad_output = input.unsqueeze(2), grad_output.unsqueeze(2)
    weight_shape, stride, padding, dilation, groups = geometry
    volume = Geometry(
        (*weight_shape[:2], *ones, *geometry.kernel),
        ones + stride,
        zeros + padding,
        ones + dilation,
        groups,
    )
    return input, grad_output, volume
