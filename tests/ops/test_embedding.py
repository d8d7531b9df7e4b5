"""Embedding gradients: every backend against one sample at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dpkernels import ops
from dpkernels.ops import native
from dpkernels.ops.embedding import cpu
from dpkernels.ops.embedding.table import Table
from tests.ops import shapes
from tests.ops.compare import BACKENDS, DTYPES, assert_as_exact_as_torch, skip_unless_runs


def operands(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int]:
    batch, positions, width, rows = shapes.EMBEDDING[name]
    generator = torch.Generator().manual_seed(17)
    indices = torch.randint(rows, (batch, positions), generator=generator)
    shape = (batch, positions, width)
    grads = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return indices, grads, rows


def microbatch(
    indices: torch.Tensor, grad_output: torch.Tensor, rows: int, padding_idx: int
) -> torch.Tensor:
    """Each sample alone through autograd: [B, V, D]."""
    grads = grad_output.new_zeros((len(indices), rows, grad_output.shape[2]))
    padding = padding_idx if padding_idx >= 0 else None
    for sample in range(len(indices)):
        table = grad_output.new_zeros((rows, grad_output.shape[2]), requires_grad=True)
        looked_up = F.embedding(indices[sample], table, padding)
        (grads[sample],) = torch.autograd.grad(looked_up, table, grad_output[sample])
    return grads


def truths(
    indices: torch.Tensor, grad_output: torch.Tensor, rows: int, padding_idx: int
) -> tuple[torch.Tensor, ...]:
    wide = grad_output.double()
    return tuple(
        microbatch(indices, grad, rows, padding_idx) for grad in (grad_output, wide, wide.abs())
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding_idx", [-1, 0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", shapes.EMBEDDING)
def test_equals_one_sample_at_a_time(
    name: str, dtype: torch.dtype, padding_idx: int, backend: str
) -> None:
    indices, grad_output, rows = operands(name, dtype)
    skip_unless_runs(ops.embedding_norm_sq, backend, indices, grad_output, padding_idx)
    grads = truths(indices, grad_output, rows, padding_idx)
    norms = tuple(grad.flatten(1).square().sum(1) for grad in grads)
    factor = torch.linspace(0.2, 1.0, len(indices))
    sums = tuple(torch.einsum("b,bvd->vd", factor.to(grad.dtype), grad) for grad in grads)
    with ops.use_backend(backend):
        norm_sq = ops.embedding_norm_sq(indices, grad_output, padding_idx)
        actual = ops.embedding_grad_sample(indices, grad_output, rows, padding_idx)
        clipped = ops.embedding_clipped_grad(indices, grad_output, factor, rows, padding_idx)
    assert_as_exact_as_torch(norm_sq, *norms)
    assert_as_exact_as_torch(actual, *grads)
    assert_as_exact_as_torch(clipped, *sums)


@pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype, threads: None) -> None:
    indices, grad_output, rows = operands("several blocks of columns", dtype)
    factor = torch.tensor([0.3, 0.0, 0.7])
    found = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        found.append(
            (
                cpu.embedding_norm_sq(indices, grad_output, 0),
                cpu.embedding_grad_sample(indices, grad_output, Table(rows, 0)),
                cpu.embedding_clipped_grad(indices, grad_output, factor, Table(rows, 0)),
            )
        )
    for others in found[1:]:
        for first, other in zip(found[0], others, strict=True):
            assert torch.equal(first, other)


@pytest.mark.parametrize("index", [-1, 7])
def test_an_index_outside_the_table_is_refused(index: int) -> None:
    indices, grad_output, rows = operands("duplicates", torch.float32)
    indices[1, 3] = index
    with pytest.raises(IndexError):
        ops.embedding_grad_sample(indices, grad_output, rows, -1)
    with pytest.raises(IndexError):
        ops.embedding_clipped_grad(indices, grad_output, torch.ones(3), rows, -1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded(backend: str) -> None:
    """Position ids are one row seen by every sample; gradients may come sliced."""
    indices, grad_output, rows = operands("duplicates", torch.float32)
    indices = indices[:1].expand_as(indices)
    grad_output = shapes.LAYOUTS["sliced"](grad_output)
    grads = truths(indices, grad_output, rows, 2)
    with ops.use_backend(backend):
        norm_sq = ops.embedding_norm_sq(indices, grad_output, 2)
        actual = ops.embedding_grad_sample(indices, grad_output, rows, 2)
    assert_as_exact_as_torch(norm_sq, *(grad.flatten(1).square().sum(1) for grad in grads))
    assert_as_exact_as_torch(actual, *grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_anything(backend: str) -> None:
    indices, grad_output, rows = operands("duplicates", torch.float32)
    exact = truths(indices, grad_output, rows, 1)[1].flatten(1).square().sum(1)
    grad_output[indices == 1] = torch.nan
    with ops.use_backend(backend):
        norm_sq = ops.embedding_norm_sq(indices, grad_output, 1)
        clipped = ops.embedding_clipped_grad(indices, grad_output, torch.ones(3), rows, 1)
    torch.testing.assert_close(norm_sq.double(), exact, rtol=1e-5, atol=0)
    assert clipped.isfinite().all()
    assert not clipped[1].any()


def test_a_bad_sample_stays_alone() -> None:
    indices, grad_output, rows = operands("duplicates", torch.float32)
    clean = ops.embedding_clipped_grad(indices[1:], grad_output[1:], torch.ones(2), rows, -1)
    grad_output[0, 3] = torch.nan
    norm_sq = ops.embedding_norm_sq(indices, grad_output, -1)
    assert norm_sq[0].isnan()
    assert norm_sq[1:].isfinite().all()
    factor = torch.tensor([0.0, 1.0, 1.0])
    total = ops.embedding_clipped_grad(indices, grad_output, factor, rows, -1)
    assert torch.equal(total, clean)


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
def test_any_memory_layout(layout: str) -> None:
    """Of the gradient; the indices are a view along the other axis."""
    indices, grad_output, rows = operands("duplicates", torch.float32)
    grad_output = shapes.LAYOUTS[layout](grad_output)
    plain = grad_output.contiguous()
    expected = ops.embedding_norm_sq(indices, plain, 2)
    table = ops.embedding_clipped_grad(indices, plain, torch.ones(3), rows, 2)
    indices = indices.t().contiguous().t()
    assert torch.equal(ops.embedding_norm_sq(indices, grad_output, 2), expected)
    actual = ops.embedding_clipped_grad(indices, grad_output, torch.ones(3), rows, 2)
    assert torch.equal(actual, table)


@pytest.mark.parametrize("backend", BACKENDS)
def test_library_registration(backend: str) -> None:
    indices, grad_output, rows = operands("duplicates", torch.float32)
    library = torch.ops.dpkernels
    with ops.use_backend(backend):
        for grads in (grad_output, shapes.LAYOUTS["sliced"](grad_output)):
            args = (indices, grads)
            torch.library.opcheck(library.embedding_norm_sq.default, (*args, 2))
            torch.library.opcheck(library.embedding_grad_sample.default, (*args, rows, 2))
            clipped = (*args, torch.ones(3), rows, 2)
            torch.library.opcheck(library.embedding_clipped_grad.default, clipped)


def test_mutation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that is off by one percent fails the comparison that guards the suite."""
    honest = cpu.embedding_norm_sq
    monkeypatch.setattr(cpu, "embedding_norm_sq", lambda *args: honest(*args) * 1.01)
    with pytest.raises(pytest.fail.Exception, match="elements pass"):
        test_equals_one_sample_at_a_time("duplicates", torch.float32, -1, "cpu")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"indices": torch.zeros(2, 3)}, "indices"),
        ({"indices": torch.zeros(3, dtype=torch.int64)}, "indices"),
        ({"grad_output": torch.zeros(2, 4, 5)}, "grad_output"),
        ({"clip_factor": torch.ones(3)}, "clip_factor"),
        ({"num_embeddings": 0}, "num_embeddings"),
        ({"padding_idx": 9}, "num_embeddings"),
        ({"padding_idx": -2}, "padding_idx"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], named: str) -> None:
    arguments: dict[str, object] = {
        "indices": torch.zeros(2, 3, dtype=torch.int64),
        "grad_output": torch.zeros(2, 3, 5),
        "clip_factor": torch.ones(2),
        "num_embeddings": 4,
        "padding_idx": -1,
    }
    with pytest.raises(ValueError, match=f"^{named}"):
        ops.embedding_clipped_grad(*(arguments | change).values())
