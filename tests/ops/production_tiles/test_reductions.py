"""Scales, shifts, statistics, embeddings, and the sums of slots, in whole blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dpkernels import ops
from dpkernels.ops.embedding.table import Table
from tests.ops import test_embedding
from tests.ops.production_tiles.support import (
    BF16,
    FP16,
    FP32,
    check,
    clipped_of,
    drawn,
    factor_of,
    norm_sq_of,
    on_triton,
)
from tests.ops.shapes import LAYOUTS
from tests.ops.triton_device import load, on_device

affine = load("dpkernels.ops.affine.triton")
embedding = load("dpkernels.ops.embedding.triton")
support = load("dpkernels.ops.triton_support")


def _per_channel(dtype: torch.dtype, layout: str = "contiguous") -> tuple[torch.Tensor, ...]:
    """Input and gradient [B, C, T]: T beyond a tile and a slot, or, channels last, C as well."""
    shape = (2, 72, 1100) if layout == "channels last" else (2, 6, 2100)
    input, grads = (LAYOUTS[layout](drawn(*shape, seed=i).to(dtype)) for i in range(2))
    return input, grads


def _statistics(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return drawn(*shape, seed=2).float(), drawn(*shape, seed=3).exp().float()


def _last(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Input and gradient [B, T, C]."""
    input, grads = (each.transpose(1, 2) for each in _per_channel(dtype, "channels last"))
    return input, grads


AFFINE: dict[str, tuple[str, Callable[[], tuple[torch.Tensor, ...]]]] = {
    "group norm, bf16": (
        "normalization_grad_sample",
        lambda: (*_per_channel(BF16), *_statistics(2, 3)),
    ),
    "group norm, bf16, channels last": (
        "normalization_grad_sample",
        lambda: (*_per_channel(BF16, "channels last"), *_statistics(2, 3)),
    ),
    "group norm, fp16": (
        "normalization_grad_sample",
        lambda: (*_per_channel(FP16), *_statistics(2, 3)),
    ),
    "group norm, fp32": (
        "normalization_grad_sample",
        lambda: (*_per_channel(FP32), *_statistics(2, 3)),
    ),
    "layer norm, bf16": (
        "normalization_last_grad_sample",
        lambda: (*_last(BF16), *_statistics(2, 1100)),
    ),
    "layer norm, fp32": (
        "normalization_last_grad_sample",
        lambda: (*_last(FP32), *_statistics(2, 1100)),
    ),
    "scale, bf16": ("affine_grad_sample", lambda: _per_channel(BF16)),
    "scale, bf16, channels last": ("affine_last_grad_sample", lambda: _last(BF16)),
    "scale's norm, bf16": ("affine_norm_sq", lambda: _per_channel(BF16)),
    "scale's clipped sum, bf16": (
        "affine_clipped_grad",
        lambda: (*_per_channel(BF16), factor_of(2)),
    ),
    "bias, bf16": ("bias_grad_sample", lambda: _per_channel(BF16)[1:]),
    "bias, fp32": ("bias_grad_sample", lambda: _per_channel(FP32)[1:]),
    "bias, bf16, channels last": ("bias_last_grad_sample", lambda: _last(BF16)[1:]),
}


@pytest.mark.parametrize("name", AFFINE)
@on_triton
def test_scale_and_shift(backend: str, name: str) -> None:
    op, arguments = AFFINE[name]
    operands = arguments()
    wide = [operand.double() for operand in operands]
    sizes = [operand.abs() for operand in wide]
    if op.startswith("normalization"):
        sizes[2] = -sizes[2]
    versions = [[operand.float() for operand in operands], wide, sizes]
    of = "affine_grad_sample" if op == "affine_norm_sq" else op
    with ops.use_backend("reference"):
        plain, exact, magnitude = (getattr(ops, of)(*version) for version in versions)
    truth = (plain, exact, magnitude)
    with ops.use_backend("triton"):
        actual = getattr(ops, op)(*on_device(*operands))
    check(actual, norm_sq_of(truth) if op == "affine_norm_sq" else truth, rounded=False)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@on_triton
def test_statistics(backend: str, dtype: torch.dtype) -> None:
    input = _per_channel(dtype)[0] + 3
    with ops.use_backend("reference"):
        exact = ops.normalization_statistics(input.double(), 3, 1e-5)
    actual = affine.normalization_statistics(*on_device(input), 3, 1e-5)
    torch.testing.assert_close(actual.cpu().double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["norm", "gradient", "clipped sum"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@on_triton
def test_embedding_gradients(backend: str, dtype: torch.dtype, form: str) -> None:
    """Runs of equal indices, and rows of the table, longer than what is read at a time."""
    rows, padding = 4, 2
    indices = torch.randint(rows, (3, 43), generator=torch.Generator().manual_seed(1))
    grads = drawn(3, 43, 300).to(dtype)
    factor = factor_of(3)
    truth = test_embedding.truths(indices, grads.float(), rows, padding)
    at, grad_output, weight = on_device(indices, grads, factor)
    if form == "norm":
        norm_sq = embedding.embedding_norm_sq(at, grad_output, padding)
        check(norm_sq, norm_sq_of(truth), rounded=False)
    elif form == "gradient":
        actual = embedding.embedding_grad_sample(at, grad_output, Table(rows, padding))
        check(actual, truth, rounded=False)
    else:
        total = embedding.embedding_clipped_grad(at, grad_output, weight, Table(rows, padding))
        check(total, clipped_of(truth, factor), rounded=False)


@pytest.mark.parametrize(("store", "square"), [(True, False), (False, True), (True, True)], ids=str)
@on_triton
def test_slots_are_added(backend: str, store: bool, square: bool) -> None:
    partials = drawn(3, 5, 2100).float()
    exact, magnitude = partials.double().sum(1), partials.double().abs().sum(1)
    truth = (partials.sum(1), exact, magnitude)
    sums, squares = support.combine(*on_device(partials), store, square)
    assert sums.numel() == (exact.numel() if store else 0)
    if store:
        check(sums, truth, rounded=False)
    if square:
        check(squares, norm_sq_of(truth), rounded=False)


@on_triton
def test_rows_are_summed(backend: str) -> None:
    rows = drawn(3, 2100).float().abs()
    exact = rows.double().sum(1)
    actual = support.sum_rows(*on_device(rows))
    check(actual, (rows.sum(1), exact, exact), rounded=False)
