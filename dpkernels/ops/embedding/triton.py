"""Embedding gradients in Triton by sorted segments: nothing [B, V, D] for norms, nothing T x T.

Indices are sorted (stably, so equal ones keep their order), a program that starts a run of equal
indices adds up the run's gradients, and every run belongs to one program: no two programs write
to one row, and the same inputs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dpkernels.ops import triton_support as support
from dpkernels.ops.embedding.table import Table

unavailable = support.unavailable

WIDTH = 256
"""Columns of the table that a program adds up at a time."""
DEPTH = 8
"""Positions that a program reads at a time."""


@triton.jit
def segment_kernel(
    ordered, order, grads, factor, out, squares,
    length, positions, width, rows, padding, g_sample, g_position, g_feature,
    WEIGHTED: tl.constexpr, STORE: tl.constexpr, SQUARE: tl.constexpr,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The run of equal indices that starts at this program's place, if one does.

    ordered: [R, length] indices, each row sorted. order: [R, length], where they stood, as
    sample * positions + position. out: [R, rows, width]. squares: [R, length].
    """
    place = tl.program_id(0).to(tl.int64)
    begin = place // length * length
    index = tl.load(ordered + place)
    before = tl.load(ordered + place - 1, mask=place > begin, other=-1)
    square = 0.0
    if (index != before) & (index != padding):
        for start in range(0, width, WIDTH):
            column = start + tl.arange(0, WIDTH)
            total = tl.zeros([WIDTH], tl.float32)
            first = place
            same = DEPTH
            while same == DEPTH:
                at = first + tl.arange(0, DEPTH)
                mine = tl.load(ordered + at, mask=at < begin + length, other=-1) == index
                stood = tl.load(order + at, mask=mine, other=0)
                sample = stood // positions
                kept = mine
                weight = tl.full([DEPTH], 1.0, tl.float32)
                if WEIGHTED:
                    weight = tl.load(factor + sample, mask=mine, other=0.0).to(tl.float32)
                    kept = mine & (weight != 0.0)
                value = tl.load(
                    grads
                    + (sample * g_sample + stood % positions * g_position)[:, None]
                    + column[None, :] * g_feature,
                    mask=kept[:, None] & (column < width)[None, :],
                    other=0.0,
                ).to(tl.float32)
                total += tl.sum(weight[:, None] * value, axis=0)
                same = tl.sum(mine.to(tl.int32))
                first += DEPTH
            if STORE:
                row = tl.full([WIDTH], 0, tl.int64) + index
                tl.store(
                    out + (place // length * rows + row) * width + column,
                    total,
                    mask=(column < width) & (row >= 0) & (row < rows),
                )
            square += tl.sum(total * total)
    if SQUARE:
        tl.store(squares + place, square)


def why_not(indices: torch.Tensor, grad_output: torch.Tensor, *rest: object) -> str | None:
    """Why these operands are not for Triton."""
    return support.why_not(grad_output)


def embedding_norm_sq(
    indices: torch.Tensor, grad_output: torch.Tensor, padding_idx: int
) -> torch.Tensor:
    """See the contract."""
    squares = support.zeros(grad_output, *indices.shape)
    _segments(indices, grad_output, padding_idx, squares=squares)
    return support.sum_rows(squares)


def embedding_grad_sample(
    indices: torch.Tensor, grad_output: torch.Tensor, table: Table
) -> torch.Tensor:
    """See the contract."""
    shape = (indices.shape[0], table.num_embeddings, grad_output.shape[2])
    out = support.zeros(grad_output, *shape)
    _segments(indices, grad_output, table.padding_idx, out=out)
    return out


def embedding_clipped_grad(
    indices: torch.Tensor, grad_output: torch.Tensor, clip_factor: torch.Tensor, table: Table
) -> torch.Tensor:
    """See the contract. One sort of all samples' indices."""
    shape = (1, table.num_embeddings, grad_output.shape[2])
    out = support.zeros(grad_output, *shape)
    factor = clip_factor.detach().contiguous()
    _segments(indices.reshape(1, -1), grad_output, table.padding_idx, out=out, factor=factor)
    return out[0]


def _segments(
    indices: torch.Tensor,
    grad_output: torch.Tensor,
    padding_idx: int,
    out: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
) -> None:
    """Run `segment_kernel` over the rows of `indices`: one per sample, or one for all samples."""
    if grad_output.numel() == 0:
        return
    ordered, order = indices.detach().sort(dim=1, stable=True)
    positions, length = grad_output.shape[1], indices.shape[1]
    order = order + torch.arange(len(indices), device=order.device)[:, None] * length
    rows = out.shape[1] if out is not None else 0
    unused = grad_output
    with torch.cuda.device_of(grad_output):
        segment_kernel[(indices.numel(),)](
            ordered, order, grad_output.detach(),
            unused if factor is None else factor,
            unused if out is None else out,
            unused if squares is None else squares,
            length, positions, grad_output.shape[2], rows, padding_idx, *grad_output.stride(),
            WEIGHTED=factor is not None, STORE=out is not None, SQUARE=squares is not None,
            WIDTH=support.power_of_two(grad_output.shape[2], WIDTH), DEPTH=DEPTH,
        )  # fmt: skip
