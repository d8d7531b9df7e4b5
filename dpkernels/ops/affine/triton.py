"""Gradients of scales and shifts in Triton: one reduction over positions, both outputs at once.

One kernel for both layouts, by strides. A long sum is spread over slots by a fixed table and the
slots are added in order; the normalised input is never formed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dpkernels.ops import triton_support as support
from dpkernels.ops.from_gradients import clipped_grad_by, norm_sq_by

unavailable = support.unavailable

TILE_ELEMENTS = 2048
"""Elements that a program holds of each operand; 128 threads."""


@triton.jit
def affine_reduce_kernel(
    values, grads, mean, rstd, out, batch, channels, positions, chunks, chunk,
    v_sample, v_channel, v_position, g_sample, g_channel, g_position,
    m_sample, m_unit, r_sample, r_unit, unit,
    SCALE: tl.constexpr, SHIFT: tl.constexpr,
    CHANNEL_STATISTICS: tl.constexpr, POSITION_STATISTICS: tl.constexpr,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """out[scale or shift, sample, chunk, channel] = the sums over one chunk of positions.

    A statistic belongs to a group of `unit` channels, or to a position.
    """
    tiles = tl.cdiv(channels, CHANNELS)
    place = (tl.program_id(0) // tiles).to(tl.int64)
    sample = place // chunks
    first = (place % chunks).to(tl.int32) * chunk
    last = tl.minimum(first + chunk, positions)
    channel = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    values += sample * v_sample
    grads += sample * g_sample
    mean += sample * m_sample
    rstd += sample * r_sample
    if CHANNEL_STATISTICS:
        centre = tl.load(mean + channel // unit * m_unit, mask=exists, other=0.0).to(tl.float32)
        centre = centre[:, None]
    scale = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    shift = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    for start in range(first, last, POSITIONS):
        at = start + tl.arange(0, POSITIONS)
        inside = exists[:, None] & (at < last)[None, :]
        grad = tl.load(
            grads + channel[:, None] * g_channel + at[None, :] * g_position,
            mask=inside,
            other=0.0,
        ).to(tl.float32)
        if SHIFT:
            shift += grad
        if SCALE:
            value = tl.load(
                values + channel[:, None] * v_channel + at[None, :] * v_position,
                mask=inside,
                other=0.0,
            ).to(tl.float32)
            if CHANNEL_STATISTICS:
                value -= centre
            if POSITION_STATISTICS:
                centre = tl.load(mean + at * m_unit, mask=at < last, other=0.0).to(tl.float32)
                spread = tl.load(rstd + at * r_unit, mask=at < last, other=0.0).to(tl.float32)
                value = (value - centre[None, :]) * spread[None, :]
            scale += value * grad
    if SCALE:
        total = tl.sum(scale, axis=1)
        if CHANNEL_STATISTICS:
            spread = tl.load(rstd + channel // unit * r_unit, mask=exists, other=0.0)
            total *= spread.to(tl.float32)
        tl.store(out + place * channels + channel, total, mask=exists)
        place += batch * chunks
    if SHIFT:
        tl.store(out + place * channels + channel, tl.sum(shift, axis=1), mask=exists)


@triton.jit
def moments_kernel(
    input, out, rows, groups, unit, positions, count, chunks, chunk,
    i_sample, i_channel, i_position, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[sum or square, row, chunk] of one group's deviations from its first element."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * chunk
    last = tl.minimum(first + chunk, count)
    base = input + row // groups * i_sample + row % groups * unit * i_channel
    pivot = tl.load(base).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        place = at // positions * i_channel + at % positions * i_position
        value = tl.load(base + place, mask=at < last, other=0.0).to(tl.float32)
        value = tl.where(at < last, value - pivot, 0.0)
        total += value
        square += value * value
    slot = row * chunks + tl.program_id(0) % chunks
    tl.store(out + slot, tl.sum(total))
    tl.store(out + slot + rows * chunks, tl.sum(square))


def why_not(*arguments: object) -> str | None:
    """Why these operands and statistics are not for Triton."""
    return support.why_not(*(each for each in arguments if isinstance(each, torch.Tensor)))


def why_not_affine_clipped_grad(*arguments: torch.Tensor) -> str | None:
    """Why these operands are not for Triton; the clip factors are not for it to read."""
    return why_not(*arguments[:2])


def affine_grad_sample(normalized: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    return support.combine(_partials(normalized, grad_output, shift=False))[0]


def bias_grad_sample(grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    return support.combine(_partials(None, grad_output, shift=True))[0]


def normalization_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """See the contract."""
    unit = input.shape[1] // mean.shape[1]
    partials = _partials(input, grad_output, shift=True, statistics=(mean, rstd), unit=unit)
    return support.combine(partials)[0].view(2, *input.shape[:2])


def normalization_last_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """See the contract."""
    turned = input.transpose(1, 2), grad_output.transpose(1, 2)
    partials = _partials(*turned, shift=True, statistics=(mean, rstd))
    return support.combine(partials)[0].view(2, input.shape[0], input.shape[2])


def normalization_statistics(input: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """See the contract. Deviations from a group's first element: no cancellation of large means."""
    batch, channels, positions = input.shape
    unit = channels // groups
    count, rows = unit * positions, batch * groups
    if count == 0:
        return torch.full((2, batch, groups), torch.nan, device=input.device)
    chunks, chunk = support.split_factor(count, groups)
    partials = support.empty(input, 2 * rows, chunks, 1)
    if rows:
        with torch.cuda.device_of(input):
            moments_kernel[(rows * chunks,)](
                input.detach(), partials, rows, groups, unit, positions, count, chunks, chunk,
                *input.stride(), BLOCK=support.power_of_two(chunk, TILE_ELEMENTS // 2, 1),
            )  # fmt: skip
    moments = support.combine(partials)[0].view(2, batch, groups) / count
    pivot = input.detach()[:, ::unit, 0].float()
    variance = (moments[1] - moments[0].square()).clamp(min=0)
    return torch.stack([pivot + moments[0], (variance + eps).rsqrt()])


affine_norm_sq = norm_sq_by(affine_grad_sample)
affine_clipped_grad = clipped_grad_by(affine_grad_sample)


def _partials(
    values: torch.Tensor | None,
    grad_output: torch.Tensor,
    shift: bool,
    statistics: tuple[torch.Tensor, torch.Tensor] | None = None,
    unit: int | None = None,
) -> torch.Tensor:
    """Run `affine_reduce_kernel` on [B, C, T] operands of any strides.

    Args:
        values: what the scale multiplies before normalisation; None for a shift alone.
        grad_output: [B, C, T].
        shift: whether the shift's gradient is wanted.
        statistics: mean and rstd to normalise by, [B, groups] or [B, T].
        unit: channels per statistic; None where a statistic belongs to a position.

    Returns:
        [outputs * B, chunks, C] float32: the scale's sums, then the shift's.
    """
    batch, channels, positions = grad_output.shape
    chunks, chunk = support.split_factor(positions, channels)
    outputs = (values is not None) + shift
    out = support.empty(grad_output, outputs * batch, chunks, channels)
    if out.numel() == 0:
        return out
    wide, deep = _tile(grad_output)
    mean, rstd = (grad_output, grad_output) if statistics is None else statistics
    held = grad_output if values is None else values
    with torch.cuda.device_of(out):
        affine_reduce_kernel[(batch * chunks * triton.cdiv(channels, wide),)](
            held.detach(), grad_output.detach(), mean.detach(), rstd.detach(), out,
            batch, channels, positions, chunks, chunk,
            *held.stride(), *grad_output.stride(), *mean.stride()[:2], *rstd.stride()[:2],
            unit or 1,
            SCALE=values is not None, SHIFT=shift,
            CHANNEL_STATISTICS=statistics is not None and unit is not None,
            POSITION_STATISTICS=statistics is not None and unit is None,
            CHANNELS=wide, POSITIONS=deep,
        )  # fmt: skip
    return out


def _tile(grads: torch.Tensor) -> tuple[int, int]:
    """(channels, positions) of a program's tile: long where memory is contiguous."""
    _, channels, positions = grads.shape
    if grads.stride(1) == 1 and grads.stride(2) != 1:
        wide = support.power_of_two(channels, 64, 1)
        return wide, support.power_of_two(positions, TILE_ELEMENTS // wide, 1)
    deep = support.power_of_two(positions, TILE_ELEMENTS, 1)
    return support.power_of_two(channels, TILE_ELEMENTS // deep, 1), deep
