"""Embedding gradients by library calls: sorted segments for norms, its scatter for tables."""

from __future__ import annotations

import torch

from dpkernels.ops.checks import kept_samples, result_dtype
from dpkernels.ops.embedding.table import Table
from dpkernels.ops.sums import squared_norms


def why_not(indices: torch.Tensor, *rest: object) -> str | None:
    """Why the library's scatter is not for these indices."""
    if indices.is_cuda:
        return "PyTorch adds equal indices in another order each time on a GPU"
    return None


def embedding_norm_sq(
    indices: torch.Tensor, grad_output: torch.Tensor, padding_idx: int
) -> torch.Tensor:
    """See the contract. Equal indices of a sample become one row of a compact table."""
    dtype = result_dtype(grad_output)
    batch, positions = indices.shape
    if indices.numel() == 0:
        return grad_output.new_zeros(batch, dtype=dtype)
    ordered, order = indices.sort(dim=1)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    segment_of_sorted = starts.cumsum(1) - 1
    segments = torch.empty_like(segment_of_sorted).scatter_(1, order, segment_of_sorted)
    grads = _without_padding(indices, grad_output.to(dtype), padding_idx)
    rows = segments + torch.arange(batch, device=indices.device).unsqueeze(1) * positions
    table = grads.new_zeros((batch * positions, grads.shape[2]))
    table.index_add_(0, rows.reshape(-1), grads.reshape(-1, grads.shape[2]))
    return squared_norms(table.view(batch, -1))


def embedding_grad_sample(
    indices: torch.Tensor, grad_output: torch.Tensor, table: Table
) -> torch.Tensor:
    """See the contract."""
    num_embeddings, padding_idx = table
    _require_rows(indices, num_embeddings)
    batch = indices.shape[0]
    rows = indices + torch.arange(batch, device=indices.device).unsqueeze(1) * num_embeddings
    grads = _without_padding(indices, grad_output.to(result_dtype(grad_output)), padding_idx)
    width = grads.shape[2]
    tables = grads.new_zeros((batch * num_embeddings, width))
    tables.index_add_(0, rows.reshape(-1), grads.reshape(-1, width))
    return tables.view(batch, num_embeddings, width)


def embedding_clipped_grad(
    indices: torch.Tensor, grad_output: torch.Tensor, clip_factor: torch.Tensor, table: Table
) -> torch.Tensor:
    """See the contract."""
    _require_rows(indices, table.num_embeddings)
    factor, (indices, grad_output) = kept_samples(clip_factor, indices, grad_output)
    dtype = result_dtype(grad_output)
    grads = grad_output.to(dtype) * factor.to(dtype)[:, None, None]
    grads = _without_padding(indices, grads, table.padding_idx)
    total = grads.new_zeros((table.num_embeddings, grads.shape[2]))
    return total.index_add_(0, indices.reshape(-1), grads.reshape(-1, grads.shape[2]))


def _require_rows(indices: torch.Tensor, num_embeddings: int) -> None:
    """Raise ``IndexError`` for an index that would end in another sample's table."""
    if indices.numel() == 0:
        return
    least, most = (int(bound) for bound in indices.aminmax())
    if least < 0 or most >= num_embeddings:
        raise IndexError(
            f"indices: {least} to {most}, expected at least 0 and less than"
            f" num_embeddings={num_embeddings}"
        )


def _without_padding(indices: torch.Tensor, grads: torch.Tensor, padding_idx: int) -> torch.Tensor:
    """`grads` with zeros where the index is the padding index (even over NaN)."""
    if padding_idx < 0:
        return grads
    return grads.masked_fill((indices == padding_idx).unsqueeze(2), 0)
