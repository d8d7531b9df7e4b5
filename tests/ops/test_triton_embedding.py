"""Triton embedding gradients by sorted segments against one sample at a time."""

from __future__ import annotations

import pytest
import torch

from dpkernels import ops
from tests.ops import shapes
from tests.ops.compare import assert_as_exact_as_torch
from tests.ops.test_embedding import truths
from tests.ops.triton_device import DTYPES, MARKS, load, on_device

embedding = load("dpkernels.ops.embedding.triton")

pytestmark = MARKS

SHAPES = {
    "one position": (3, 1, 4, 5),
    "one index": (2, 9, 3, 1),
    "empty batch": (0, 4, 3, 5),
    "no positions": (2, 0, 3, 5),
    "duplicates": (3, 14, 5, 4),
    "mostly distinct": (2, 9, 1, 1000),
    "wide": (1, 4, 37, 3),
    "runs of exactly one block": (2, 8, 2, 2),
}
"""(B, T, D, V)"""
CASES = [(name, torch.float32) for name in SHAPES] + [("duplicates", d) for d in DTYPES[1:]]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "WIDTH", 16)
    monkeypatch.setattr(embedding, "DEPTH", 4)


def operands(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int]:
    batch, positions, width, rows = SHAPES[name]
    generator = torch.Generator().manual_seed(17)
    indices = torch.randint(rows, (batch, positions), generator=generator)
    if name.startswith("runs"):
        indices = torch.arange(positions).remainder(rows).expand(batch, positions).contiguous()
    grads = torch.randn(batch, positions, width, generator=generator, dtype=torch.float64)
    return indices, grads.to(dtype), rows


def check(indices: torch.Tensor, grad_output: torch.Tensor, rows: int, padding_idx: int) -> None:
    grads = truths(indices, grad_output, rows, padding_idx)
    norms = tuple(grad.flatten(1).square().sum(1) for grad in grads)
    factor = torch.linspace(0.2, 1.0, len(indices))
    sums = tuple(torch.einsum("b,bvd->vd", factor.to(grad.dtype), grad) for grad in grads)
    moved, gradient, weight = on_device(indices, grad_output, factor)
    with ops.use_backend("triton"):
        norm_sq = ops.embedding_norm_sq(moved, gradient, padding_idx)
        actual = ops.embedding_grad_sample(moved, gradient, rows, padding_idx)
        clipped = ops.embedding_clipped_grad(moved, gradient, weight, rows, padding_idx)
    assert_as_exact_as_torch(norm_sq.cpu(), *norms)
    assert_as_exact_as_torch(actual.cpu(), *grads)
    assert_as_exact_as_torch(clipped.cpu(), *sums)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_equals_one_sample_at_a_time(name: str, dtype: torch.dtype) -> None:
    check(*operands(name, dtype), padding_idx=-1)


@pytest.mark.parametrize("name", ["one index", "duplicates"])
def test_padding_is_left_out(name: str) -> None:
    check(*operands(name, torch.float32), padding_idx=0)


def test_strided_and_expanded() -> None:
    """Position ids are one row seen by every sample; gradients may come sliced."""
    indices, grad_output, rows = operands("duplicates", torch.float32)
    check(indices[:1].expand_as(indices), shapes.LAYOUTS["sliced"](grad_output), rows, 2)


def test_padding_may_hold_anything() -> None:
    indices, grad_output, rows = operands("duplicates", torch.float32)
    exact = truths(indices, grad_output, rows, 1)[1].flatten(1).square().sum(1)
    grad_output[indices == 1] = torch.nan
    indices, grad_output, factor = on_device(indices, grad_output, torch.ones(3))
    with ops.use_backend("triton"):
        norm_sq = ops.embedding_norm_sq(indices, grad_output, 1)
        clipped = ops.embedding_clipped_grad(indices, grad_output, factor, rows, 1)
    torch.testing.assert_close(norm_sq.cpu().double(), exact, rtol=1e-5, atol=0)
    assert clipped.isfinite().all()
    assert not clipped[1].any()


def test_a_bad_sample_stays_alone_and_bits_repeat() -> None:
    indices, grad_output, rows = operands("duplicates", torch.float32)
    indices, grad_output, factor = on_device(indices, grad_output, torch.tensor([0.0, 1.0, 1.0]))
    with ops.use_backend("triton"):
        clean = ops.embedding_clipped_grad(indices, grad_output, factor, rows, -1)
        grad_output[0, 3] = torch.nan
        norm_sq = ops.embedding_norm_sq(indices, grad_output, -1)
        total = ops.embedding_clipped_grad(indices, grad_output, factor, rows, -1)
    assert norm_sq[0].isnan()
    assert norm_sq[1:].isfinite().all()
    assert torch.equal(total, clean)


def test_mutation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that is off by one percent fails the comparison that guards the suite."""
    honest = embedding.embedding_norm_sq
    monkeypatch.setattr(embedding, "embedding_norm_sq", lambda *args: honest(*args) * 1.01)
    with pytest.raises(pytest.fail.Exception, match="elements pass"):
        test_equals_one_sample_at_a_time("duplicates", torch.float32)
