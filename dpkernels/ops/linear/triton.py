"""Triton kernels for linear layers (docs/math.md section 2).

Norms: the streamed symmetric Gram where T < H = 2IO/(I+O), with both Gram tiles in registers, one
program per sample and pair of tiles t <= s; otherwise each tile of the gradient is formed,
squared, summed and discarded. The clipped sum forms a sample's gradient tile in float32 exactly
as the norm did and only then multiplies it by the clip factor, which never meets a 16-bit number.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from dpkernels.ops import triton_support as support
from dpkernels.ops.triton_support import Jobs, Tile, tile_gram, tile_pair

unavailable = support.unavailable

GRAM = {2: Tile(128, 128, 64, 8, 3), 4: Tile(64, 64, 32, 8, 3)}
GRADIENT = {2: Tile(128, 128, 64, 8, 3), 4: Tile(64, 64, 32, 4, 3)}
"""By the operands' bytes per element."""
ROWS = Tile(64, 64, 32, 4, 2)
ROW_FORM_POSITIONS = 16
"""Below so many positions a sample is no row of tiles: all samples' positions are one long sum."""
OUTER_BLOCK = 1024


@triton.jit
def linear_gram_kernel(
    activations, grads, partials, positions, features_in, features_out, a_sample, a_step,
    a_feature, g_sample, g_step, g_feature, pairs, TILE: tl.constexpr, DEPTH: tl.constexpr,
    A_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partials[sample, pair] = the share of one pair of tiles t <= s in the squared norm."""
    sample = (tl.program_id(0) // pairs).to(tl.int64)
    pair = tl.program_id(0) % pairs
    low, high = tile_pair(pair)
    rows = low * TILE + tl.arange(0, TILE)
    columns = high * TILE + tl.arange(0, TILE)
    left = tile_gram(
        activations + sample * a_sample,
        rows, columns, rows * a_step, columns * a_step, positions, features_in, a_feature,
        TILE, DEPTH, A_DTYPE, PRECISION,
    )  # fmt: skip
    right = tile_gram(
        grads + sample * g_sample,
        rows, columns, rows * g_step, columns * g_step, positions, features_out, g_feature,
        TILE, DEPTH, G_DTYPE, PRECISION,
    )  # fmt: skip
    share = tl.sum(left * right)
    tl.store(partials + sample * pairs + pair, tl.where(low == high, share, 2.0 * share))


@triton.jit
def _square_sum(base, features, feature, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, features, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(base + at * feature, mask=at < features, other=0.0).to(tl.float32)
        total += value * value
    return tl.sum(total)


@triton.jit
def linear_outer_norm_kernel(
    activations, grads, out, features_in, features_out, a_sample, a_feature, g_sample, g_feature,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One position: |A|^2 |G|^2."""
    sample = tl.program_id(0).to(tl.int64)
    left = _square_sum(activations + sample * a_sample, features_in, a_feature, BLOCK)
    right = _square_sum(grads + sample * g_sample, features_out, g_feature, BLOCK)
    tl.store(out + sample, left * right)


@triton.jit
def _place(features_in, features_out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's slot, its tile of so many, and the tile's rows and columns."""
    wide = tl.cdiv(features_in, COLUMNS)
    tiles = tl.cdiv(features_out, ROWS) * wide
    slot = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row = tile // wide * ROWS + tl.arange(0, ROWS)
    column = tile % wide * COLUMNS + tl.arange(0, COLUMNS)
    return slot, tile, tiles, row, column


@triton.jit
def linear_gradient_kernel(
    activations, grads, factor, out, squares, jobs, slots, chunks, chunk, positions, features_in,
    features_out, a_sample, a_step, a_feature, g_sample, g_step, g_feature,
    WEIGHTED: tl.constexpr, STORE: tl.constexpr, SQUARE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[slot] = the sum of its jobs; a job is one chunk of one sample's positions.

    Slots are jobs for per-sample gradients. A clipped sum has fewer: slot, slot + slots, ...
    """
    slot, tile, tiles, row, column = _place(features_in, features_out, ROWS, COLUMNS)
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
                left = tl.load(
                    grads + sample * g_sample + row[:, None] * g_feature + at[None, :] * g_step,
                    mask=(row < features_out)[:, None] & (at < last)[None, :],
                    other=0.0,
                )
                right = tl.load(
                    activations
                    + sample * a_sample
                    + at[:, None] * a_step
                    + column[None, :] * a_feature,
                    mask=(at < last)[:, None] & (column < features_in)[None, :],
                    other=0.0,
                )
                gradient = tl.dot(
                    left.to(DTYPE), right.to(DTYPE), gradient, input_precision=PRECISION
                )
            total += weight * gradient
    if STORE:
        tl.store(
            out + (slot * features_out + row[:, None]) * features_in + column[None, :],
            total,
            mask=(row < features_out)[:, None] & (column < features_in)[None, :],
        )
    if SQUARE:
        tl.store(squares + slot * tiles + tile, tl.sum(total * total))


@triton.jit
def linear_rows_kernel(
    activations, grads, factor, out, length, chunk, positions, features_in, features_out,
    a_sample, a_step, a_feature, g_sample, g_step, g_feature, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Clipped sum over short samples: out[slot] over `chunk` of all samples' positions.

    The factor multiplies in float32, and so do the matrix products.
    """
    slot, tile, tiles, row, column = _place(features_in, features_out, ROWS, COLUMNS)
    first = slot * chunk
    last = tl.minimum(first + chunk, length)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, last, DEPTH):
        at = start + tl.arange(0, DEPTH)
        sample = at // positions
        step = at % positions
        weight = tl.load(factor + sample, mask=at < last, other=0.0).to(tl.float32)
        kept = weight != 0.0
        left = tl.load(
            grads + row[:, None] * g_feature + (sample * g_sample + step * g_step)[None, :],
            mask=(row < features_out)[:, None] & kept[None, :],
            other=0.0,
        )
        right = tl.load(
            activations
            + (sample * a_sample + step * a_step)[:, None]
            + column[None, :] * a_feature,
            mask=kept[:, None] & (column < features_in)[None, :],
            other=0.0,
        )
        left = left.to(tl.float32) * weight[None, :]
        total = tl.dot(left, right.to(tl.float32), total, input_precision=PRECISION)
    tl.store(
        out + (slot * features_out + row[:, None]) * features_in + column[None, :],
        total,
        mask=(row < features_out)[:, None] & (column < features_in)[None, :],
    )


def why_not(activations: torch.Tensor, grad_output: torch.Tensor, *rest: object) -> str | None:
    """Why these operands are not for Triton."""
    return support.why_not(activations, grad_output)


def linear_norm_sq(activations: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract. The form with the fewest floating-point operations."""
    _, positions, features_in = activations.shape
    features_out = grad_output.shape[2]
    if activations.numel() == 0 or grad_output.numel() == 0:
        return support.zeros(activations, activations.shape[0])
    if positions == 1:
        return outer_norm_sq(activations, grad_output)
    if positions * (features_in + features_out) < 2 * features_in * features_out:
        return gram_norm_sq(activations, grad_output)
    return recompute_norm_sq(activations, grad_output)


def outer_norm_sq(activations: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """Squared norms [B] where T = 1."""
    batch, _, features_in = activations.shape
    out = support.empty(activations, batch)
    with torch.cuda.device_of(activations):
        linear_outer_norm_kernel[(batch,)](
            activations.detach(), grad_output.detach(), out, features_in, grad_output.shape[2],
            activations.stride(0), activations.stride(2), grad_output.stride(0),
            grad_output.stride(2), BLOCK=OUTER_BLOCK,
        )  # fmt: skip
    return out


def gram_norm_sq(activations: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """sum_{t,s} <A_t, A_s><G_t, G_s>, nothing T x T in memory: [B]. No operand may be empty."""
    batch, positions, features_in = activations.shape
    tile = GRAM[max(activations.element_size(), grad_output.element_size())]
    side = support.power_of_two(positions, tile.rows)
    count = triton.cdiv(positions, side)
    pairs = count * (count + 1) // 2
    partials = support.empty(activations, batch, pairs)
    with torch.cuda.device_of(activations):
        linear_gram_kernel[(batch * pairs,)](
            activations.detach(), grad_output.detach(), partials, positions, features_in,
            grad_output.shape[2], *activations.stride(), *grad_output.stride(), pairs, TILE=side,
            DEPTH=tile.depth, A_DTYPE=support.common_dtype(activations),
            G_DTYPE=support.common_dtype(grad_output), PRECISION=support.input_precision("matmul"),
            num_warps=tile.warps if side == tile.rows else 4, num_stages=tile.stages,
        )  # fmt: skip
    return support.sum_rows(partials)


def recompute_norm_sq(activations: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """Each tile of the gradient formed, squared, summed and discarded: [B]."""
    return _per_sample(activations, grad_output, store=False, square=True)[1]


def linear_grad_sample(activations: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    return _per_sample(activations, grad_output, store=True, square=False)[0]


def grad_sample_and_norm_sq(
    activations: torch.Tensor, grad_output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-sample gradients [B, O, I] and, from the same values, their squared norms [B]."""
    return _per_sample(activations, grad_output, store=True, square=True)


def _per_sample(
    activations: torch.Tensor, grad_output: torch.Tensor, store: bool, square: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, positions, features_in = activations.shape
    shape = (batch, grad_output.shape[2], features_in)
    if activations.numel() == 0 or grad_output.numel() == 0:
        return support.zeros(activations, *shape), support.zeros(activations, batch)
    run = functools.partial(_gradient, activations, grad_output)
    weights = shape[1] * shape[2]
    grads, norm_sq = support.per_sample(run, batch, positions, weights, store, square)
    return grads.view(shape) if store else grads, norm_sq


def linear_clipped_grad(
    activations: torch.Tensor, grad_output: torch.Tensor, clip_factor: torch.Tensor
) -> torch.Tensor:
    """See the contract."""
    positions, shape = activations.shape[1], (grad_output.shape[2], activations.shape[2])
    if activations.numel() == 0 or grad_output.numel() == 0:
        return support.zeros(activations, *shape)
    if positions < ROW_FORM_POSITIONS:
        partials = _short_rows(activations, grad_output, clip_factor.detach().contiguous())
        return support.total(partials).view(shape)
    run = functools.partial(_gradient, activations, grad_output)
    return support.clipped_sum(run, clip_factor, positions, shape[0] * shape[1]).view(shape)


def _gradient(
    activations: torch.Tensor, grad_output: torch.Tensor, jobs: Jobs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the gradient kernel."""
    factor, slots, chunks, chunk, store, square = jobs
    batch, positions, features_in = activations.shape
    features_out = grad_output.shape[2]
    tile = GRADIENT[max(activations.element_size(), grad_output.element_size())]
    rows = support.power_of_two(features_out, tile.rows)
    columns = support.power_of_two(features_in, tile.columns)
    tiles = triton.cdiv(features_out, rows) * triton.cdiv(features_in, columns)
    out = support.empty(activations, *((slots, features_out * features_in) if store else (0,)))
    squares = support.empty(activations, *((slots, tiles) if square else (0, 0)))
    with torch.cuda.device_of(activations):
        linear_gradient_kernel[(slots * tiles,)](
            activations.detach(), grad_output.detach(), out if factor is None else factor, out,
            squares, batch * chunks, slots, chunks, chunk, positions, features_in, features_out,
            *activations.stride(), *grad_output.stride(), WEIGHTED=factor is not None,
            STORE=store, SQUARE=square, ROWS=rows, COLUMNS=columns,
            DEPTH=support.power_of_two(chunk, tile.depth),
            DTYPE=support.common_dtype(activations, grad_output),
            PRECISION=support.input_precision("matmul"),
            num_warps=tile.warps if rows * columns > 64 * 64 else 4,
            num_stages=tile.stages,
        )  # fmt: skip
    return out, squares


def _short_rows(
    activations: torch.Tensor, grad_output: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """Run `linear_rows_kernel`: [slots, O * I]."""
    batch, positions, features_in = activations.shape
    features_out = grad_output.shape[2]
    length = batch * positions
    slots, chunk = support.split_factor(length, features_in * features_out)
    rows = support.power_of_two(features_out, ROWS.rows)
    columns = support.power_of_two(features_in, ROWS.columns)
    tiles = triton.cdiv(features_out, rows) * triton.cdiv(features_in, columns)
    out = support.empty(activations, slots, features_out * features_in)
    with torch.cuda.device_of(activations):
        linear_rows_kernel[(slots * tiles,)](
            activations.detach(), grad_output.detach(), factor, out, length, chunk, positions,
            features_in, features_out, *activations.stride(), *grad_output.stride(), ROWS=rows,
            COLUMNS=columns, DEPTH=ROWS.depth, PRECISION=support.input_precision("matmul"),
            num_warps=ROWS.warps, num_stages=ROWS.stages,
        )  # fmt: skip
    return out
