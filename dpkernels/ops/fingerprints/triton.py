"""Fingerprints in Triton: sums of chunks of a row, which are then added in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dpkernels.ops import triton_support as support
from dpkernels.ops.fingerprints.multipliers import BLOCK, IN_BLOCK, OF_BLOCK
from dpkernels.ops.fingerprints.runs import runs_of

unavailable = support.unavailable

CHUNK_BLOCKS = 16
"""Blocks that a program adds up."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def multiplier(place, seed):
    """The odd 32-bit number of each place: int64."""
    x = tl.cast(place, tl.int64) ^ seed
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return (x ^ (x >> 16)) | 1


@triton.jit
def fingerprint_kernel(
    rows, words, bits, moments, size, chunks, length, sample_stride, run_stride,
    IN_FIRST: tl.constexpr, IN_SECOND: tl.constexpr,
    OF_FIRST: tl.constexpr, OF_SECOND: tl.constexpr,
    ONE_RUN: tl.constexpr, LOW: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK_BLOCKS: tl.constexpr,
):  # fmt: skip
    """bits[sample, chunk, 2] and moments[sample, chunk, 3] of one chunk of a row.

    `words` are the values of `rows` as integers of the same width. LOW has the bits of a word; WIDE
    values have two.
    """
    slot = tl.program_id(0).to(tl.int64)
    first = (slot % chunks).to(tl.int32) * CHUNK_BLOCKS
    start = slot // chunks * sample_stride
    place = tl.arange(0, BLOCK)
    by_first = multiplier(place, IN_FIRST)
    by_second = multiplier(place, IN_SECOND)
    bits_first = tl.zeros([BLOCK], tl.int64)
    bits_second = tl.zeros([BLOCK], tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    signed = tl.zeros([BLOCK], tl.float64)
    last = tl.minimum(first + CHUNK_BLOCKS, tl.cdiv(size, BLOCK))
    for block in range(first, last):
        at = block * BLOCK + place
        inside = at < size
        offset = start + (at if ONE_RUN else at // length * run_stride + at % length)
        word = tl.load(words + offset, mask=inside, other=0).to(tl.int64)
        low = word & LOW
        in_first = low * by_first
        in_second = low * by_second
        if WIDE:
            high = (word >> 32) & 0xFFFFFFFF
            in_first += high * multiplier(place + BLOCK, IN_FIRST)
            in_second += high * multiplier(place + BLOCK, IN_SECOND)
        of_first = multiplier(block, OF_FIRST)
        bits_first += in_first * of_first
        bits_second += in_second * multiplier(block, OF_SECOND)
        value = tl.load(rows + offset, mask=inside, other=0).to(tl.float64)
        total += value
        squares += value * value
        negative = multiplier(place + 8 * (of_first >> 25), IN_FIRST) >> 31
        signed += tl.where(negative == 1, -value, value)
    tl.store(bits + slot * 2, tl.sum(bits_first))
    tl.store(bits + slot * 2 + 1, tl.sum(bits_second))
    tl.store(moments + slot * 3, tl.sum(total))
    tl.store(moments + slot * 3 + 1, tl.sum(squares))
    tl.store(moments + slot * 3 + 2, tl.sum(signed))


def why_not_fingerprint(rows: torch.Tensor) -> str | None:
    """Why these rows are not for Triton."""
    reason = support.why_not_device(rows)
    if reason is not None:
        return reason
    values = 2 if rows.is_complex() else 1
    reach = values * max(support.span(rows), rows.numel() // max(1, len(rows)))
    if reach >= support.INDEX_LIMIT:
        return f"one sample spans {reach} values, more than 32-bit offsets reach"
    return None


def fingerprint(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract."""
    tensor, samples, runs, length, sample_stride, run_stride = runs_of(rows)
    tensor = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
    size = runs * length
    chunks = max(1, triton.cdiv(size, CHUNK_BLOCKS * BLOCK))
    bits = torch.empty((samples, chunks, 2), dtype=torch.int64, device=rows.device)
    moments = torch.empty((samples, chunks, 3), dtype=torch.float64, device=rows.device)
    if samples:
        width = tensor.element_size()
        with torch.cuda.device_of(tensor):
            fingerprint_kernel[(samples * chunks,)](
                tensor, tensor.view(_WORDS[width]), bits, moments,
                size, chunks, length, sample_stride, run_stride,
                *IN_BLOCK, *OF_BLOCK,
                ONE_RUN=runs == 1, LOW=2 ** (8 * min(width, 4)) - 1, WIDE=width == 8,
                BLOCK=BLOCK, CHUNK_BLOCKS=CHUNK_BLOCKS, num_warps=8,
            )  # fmt: skip
    return (bits[:, 0], moments[:, 0]) if chunks == 1 else (bits.sum(1), moments.sum(1))
