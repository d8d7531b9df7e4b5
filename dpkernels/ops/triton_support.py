"""What the Triton kernels of all op families share.

Determinism: a kernel never adds to memory that another program writes. A sum that is spread over
programs goes to a buffer with one slot per program, and a second kernel adds the slots in order.
How many slots there are is a function of the layer's shape alone (:func:`split_factor`), so the
same inputs give the same bits on every device.

On CPU tensors the kernels run under Triton's interpreter, if ``TRITON_INTERPRET=1`` was set before
Triton was imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dpkernels.ops.precision import float32_products

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_LIMIT = 2**31
COMBINE_BLOCK = 1024
SPLITS = (
    (1 << 12, 128),
    (1 << 14, 64),
    (1 << 15, 32),
    (1 << 16, 16),
    (1 << 18, 4),
    (1 << 20, 2),
)
"""Number of weights up to which a sum over positions is spread over so many slots."""
CHUNK_POSITIONS = 1024
"""The fewest positions that one slot adds up."""


@dataclass(frozen=True)
class Tile:
    """The largest tiles of a kernel: `rows` by `columns` results, `depth` summed at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@triton.jit
def _combine_kernel(
    partials, out, squares, slots, size, blocks,
    STORE: tl.constexpr, SQUARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row] = sum over slots of partials[row, slot]; squares[row, block] = its squared sum."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(slots):
        total += tl.load(partials + (row * slots + slot) * size + at, mask=inside, other=0.0)
    if STORE:
        tl.store(out + row * size + at, total, mask=inside)
    if SQUARE:
        tl.store(squares + row * blocks + block, tl.sum(total * total))


@triton.jit
def _sum_rows_kernel(partials, out, columns, BLOCK: tl.constexpr):
    """out[row] = sum of partials[row, :]; what rounding made negative counts as 0, NaN stays."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partials + row * columns + at, mask=at < columns, other=0.0)
    result = tl.sum(total)
    tl.store(out + row, tl.where(result < 0, 0.0, result))


@triton.jit
def tile_pair(pair):
    """The pair-th of (0, 0), (0, 1), (1, 1), (0, 2), ...: low <= high."""
    high = ((tl.sqrt(8.0 * pair + 1.0) - 1.0) * 0.5).to(tl.int32)
    high -= (high * (high + 1) // 2 > pair).to(tl.int32)
    high += ((high + 1) * (high + 2) // 2 <= pair).to(tl.int32)
    return pair - high * (high + 1) // 2, high


@triton.jit
def tile_gram(
    base, row, column, row_offset, column_offset, positions, features, feature,
    TILE: tl.constexpr, DEPTH: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<x_t, x_s> for t in row and s in column, which lie at the offsets: [TILE, TILE] float32."""
    gram = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, features, DEPTH):
        at = start + tl.arange(0, DEPTH)
        left = tl.load(
            base + row_offset[:, None] + at[None, :] * feature,
            mask=(row < positions)[:, None] & (at < features)[None, :],
            other=0.0,
        )
        right = tl.load(
            base + at[:, None] * feature + column_offset[None, :],
            mask=(at < features)[:, None] & (column < positions)[None, :],
            other=0.0,
        )
        gram = tl.dot(left.to(DTYPE), right.to(DTYPE), gram, input_precision=PRECISION)
    return gram


INTERPRETED = not isinstance(_combine_kernel, triton.JITFunction)


def unavailable() -> str | None:
    """Why no Triton kernel can run on this machine."""
    if INTERPRETED or torch.cuda.is_available():
        return None
    return (
        "Triton kernels need a CUDA device (TRITON_INTERPRET=1 in the environment, set before"
        " Triton is imported, runs them slowly on CPU tensors)"
    )


def why_not(*tensors: torch.Tensor) -> str | None:
    """Why no Triton kernel can take these floating-point operands, samples on the first axis."""
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"Triton kernels take float32, bfloat16 and float16 and this is {tensor.dtype}"
        reason = why_not_device(tensor)
        if reason is not None:
            return reason
        if span(tensor) >= INDEX_LIMIT:
            return f"one sample spans {span(tensor)} elements, more than 32-bit offsets reach"
    return None


def why_not_device(tensor: torch.Tensor) -> str | None:
    """Why no Triton kernel can run where `tensor` is."""
    if tensor.device.type != "cuda" and not INTERPRETED:
        return (
            f"Triton kernels take CUDA tensors and these are on {tensor.device}"
            " (TRITON_INTERPRET=1 runs them on the CPU)"
        )
    if tensor.device.type == "cuda" and _capability(tensor.get_device()) < (8, 0):
        return "Triton kernels need compute capability 8.0"
    return None


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def span(tensor: torch.Tensor) -> int:
    """Distance in elements from the first to the last element of one sample."""
    axes = zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    return sum((size - 1) * stride for size, stride in axes if size)


def power_of_two(size: int, most: int, least: int = 16) -> int:
    """The smallest power of two >= `size`, kept between `least` and `most` (matrix units: 16)."""
    return max(least, min(most, triton.next_power_of_2(max(size, 1))))


def common_dtype(*tensors: torch.Tensor) -> tl.dtype:
    """The Triton dtype in which operands of these dtypes are multiplied.

    The interpreter multiplies the bit patterns of bfloat16: there, float32, which is exact.
    """
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return {
        torch.float32: tl.float32,
        torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16,
        torch.float16: tl.float16,
    }[dtype]


def input_precision(kind: str) -> str:
    """How a kernel multiplies float32, as ``tl.dot`` takes it: as PyTorch's switches allow.

    Args:
        kind: of the products, ``"matmul"`` or ``"conv"``.
    """
    return "ieee" if float32_products("cuda", kind) == "ieee" else "tf32"


def split_factor(positions: int, weights: int) -> tuple[int, int]:
    """Over how many slots a sum over positions is spread: one sample's, or a clipped sum's of all.

    A function of the operands' shapes alone, from the fixed table SPLITS: the device never enters.

    Returns:
        (slots, positions of each slot).
    """
    wanted = next((slots for most, slots in SPLITS if weights <= most), 1)
    if wanted == 1:
        return 1, max(positions, 1)
    chunk = max(CHUNK_POSITIONS, triton.cdiv(positions, wanted))
    chunk = triton.cdiv(chunk, CHUNK_POSITIONS // 8) * (CHUNK_POSITIONS // 8)
    return max(1, triton.cdiv(positions, chunk)), chunk


def empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Room for results of kernels, float32, where `like` is."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def zeros(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """As :func:`empty`, filled with zeros."""
    return torch.zeros(shape, dtype=torch.float32, device=like.device)


def sum_rows(partials: torch.Tensor) -> torch.Tensor:
    """Sums of the rows of [B, N] float32 in a fixed order, never negative: [B]."""
    rows, columns = partials.shape
    out = partials.new_empty(rows)
    if rows:
        with torch.cuda.device_of(partials):
            _sum_rows_kernel[(rows,)](partials, out, columns, BLOCK=power_of_two(columns, 1024))
    return out


def combine(
    partials: torch.Tensor, store: bool = True, square: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the slots of [R, S, N] float32 in order.

    Args:
        partials: contiguous.
        store: whether the sums are wanted.
        square: whether their squared sums are wanted.

    Returns:
        (sums [R, N], squared sums [R]); what is not wanted is empty.
    """
    rows, slots, size = partials.shape
    blocks = triton.cdiv(size, COMBINE_BLOCK)
    out = partials.new_empty((rows, size) if store else (0,))
    squares = partials.new_empty((rows, blocks) if square else (0, 0))
    if rows and blocks:
        with torch.cuda.device_of(partials):
            _combine_kernel[(rows * blocks,)](
                partials, out, squares, slots, size, blocks,
                STORE=store, SQUARE=square, BLOCK=COMBINE_BLOCK,
            )  # fmt: skip
    return out, sum_rows(squares)


class Jobs(NamedTuple):
    """How a gradient kernel's work is divided: a job is `chunk` positions of one sample.

    There are `chunks` jobs for each sample; job j is added to slot j % slots.
    """

    factor: torch.Tensor | None
    """[B], the samples' clip factors; None for per-sample gradients."""
    slots: int
    chunks: int
    chunk: int
    store: bool
    square: bool
    """Whether the sums are wanted, and the squared sums of their tiles."""


Gradient = Callable[[Jobs], tuple[torch.Tensor, torch.Tensor]]
"""Runs a gradient kernel: sums [slots, weights], squares [slots, tiles], empty if unwanted."""


def per_sample(
    run: Gradient, batch: int, positions: int, weights: int, store: bool, square: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Gradients [B, weights], squared norms [B]) of one sum over positions each.

    What is not wanted is empty.
    """
    chunks, chunk = split_factor(positions, weights)
    whole = chunks == 1
    jobs = Jobs(None, batch * chunks, chunks, chunk, store or not whole, square and whole)
    sums, squares = run(jobs)
    if whole:
        return sums, sum_rows(squares)
    return combine(sums.view(batch, chunks, weights), store, square)


def clipped_sum(run: Gradient, factor: torch.Tensor, positions: int, weights: int) -> torch.Tensor:
    """[weights]: the samples' gradients in float32 as their norms saw them, times their factors."""
    chunks, chunk = split_factor(positions, weights)
    slots, _ = split_factor(len(factor) * positions, weights)
    slots = min(slots, len(factor) * chunks)
    return total(run(Jobs(factor.detach().contiguous(), slots, chunks, chunk, True, False))[0])


def total(partials: torch.Tensor) -> torch.Tensor:
    """The slots of [S, N] added in order: [N]."""
    return partials[0] if len(partials) == 1 else combine(partials[None])[0][0]
