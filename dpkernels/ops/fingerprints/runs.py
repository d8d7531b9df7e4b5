"""The values of a tensor in the order of memory: rows of runs, at fixed distances."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Runs(NamedTuple):
    """A row is `runs` runs of `length` adjacent values; strides are in values.

    The values start where `tensor` starts: real, detached, not negated lazily.
    """

    tensor: torch.Tensor
    samples: int
    runs: int
    length: int
    sample_stride: int
    run_stride: int

    def view(self) -> torch.Tensor:
        """[samples, runs, length], without a copy."""
        strides = self.sample_stride, self.run_stride, 1
        return self.tensor.as_strided((self.samples, self.runs, self.length), strides)


def runs_of(rows: torch.Tensor) -> Runs:
    """`rows` [samples, ...] in the order of memory; a copy only where rows are no such runs."""
    if rows.is_complex():
        rows = torch.view_as_real(rows.resolve_conj())
    rows = rows.detach().resolve_neg()
    samples = rows.shape[0]
    if rows.is_contiguous():
        length = rows.numel() // samples if samples else 0
        return Runs(rows, samples, 1, length, length, length)
    strides = rows.stride()
    order = sorted(range(1, rows.ndim), key=strides.__getitem__, reverse=True)
    axes = _joined([(rows.shape[axis], strides[axis]) for axis in order])
    if not axes or axes[-1][1] != 1:
        axes.append((1, 1))  # no values are adjacent
    if len(axes) > 2:
        return runs_of(rows.permute(0, *order).contiguous())
    (runs, run_stride), (length, _) = axes if len(axes) == 2 else [(1, 0), *axes]
    return Runs(rows, samples, runs, length, strides[0], run_stride)


def _joined(axes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(size, stride) of axes, those joined that are evenly spaced together; none of size 1."""
    joined: list[tuple[int, int]] = []
    for size, stride in axes:
        if size == 1:
            continue
        if joined and joined[-1][1] == size * stride:
            size *= joined.pop()[0]
        joined.append((size, stride))
    return joined
