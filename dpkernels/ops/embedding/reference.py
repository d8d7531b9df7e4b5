"""Plain and slow: every sample's table gradient in full, one position after the other."""

from __future__ import annotations

import torch

from dpkernels.ops.checks import result_dtype
from dpkernels.ops.embedding.table import Table
from dpkernels.ops.from_gradients import clipped_grad_by


def embedding_grad_sample(
    indices: torch.Tensor, grad_output: torch.Tensor, table: Table
) -> torch.Tensor:
    """See the contract."""
    dtype = result_dtype(grad_output)
    shape = (indices.shape[0], table.num_embeddings, grad_output.shape[2])
    result = grad_output.new_zeros(shape, dtype=dtype)
    for sample, row in enumerate(indices.tolist()):
        for position, index in enumerate(row):
            if index != table.padding_idx:
                result[sample, index] += grad_output[sample, position].to(dtype)
    return result


def embedding_norm_sq(
    indices: torch.Tensor, grad_output: torch.Tensor, padding_idx: int
) -> torch.Tensor:
    """See the contract."""
    rows = int(indices.max()) + 1 if indices.numel() else 1
    grads = embedding_grad_sample(indices, grad_output, Table(rows, padding_idx))
    return grads.square().sum((1, 2))


embedding_clipped_grad = clipped_grad_by(embedding_grad_sample)
