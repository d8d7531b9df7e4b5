"""Plain and slow: every sample's table gradient in full, one position after the other."""

from __future__ import annotations

import torch

from dpkernels.ops.checks import kept_samples, result_dtype


def embedding_grad_sample(
    indices: torch.Tensor, grad_output: torch.Tensor, num_embeddings: int, padding_idx: int
) -> torch.Tensor:
    """See the contract."""
    dtype = result_dtype(grad_output)
    shape = (indices.shape[0], num_embeddings, grad_output.shape[2])
    result = grad_output.new_zeros(shape, dtype=dtype)
    for sample, row in enumerate(indices.tolist()):
        for position, index in enumerate(row):
            if index != padding_idx:
                result[sample, index] += grad_output[sample, position].to(dtype)
    return result


def embedding_norm_sq(
    indices: torch.Tensor, grad_output: torch.Tensor, padding_idx: int
) -> torch.Tensor:
    """See the contract."""
    rows = int(indices.max()) + 1 if indices.numel() else 1
    grads = embedding_grad_sample(indices, grad_output, rows, padding_idx)
    return grads.square().sum((1, 2))


def embedding_clipped_grad(
    indices: torch.Tensor,
    grad_output: torch.Tensor,
    clip_factor: torch.Tensor,
    num_embeddings: int,
    padding_idx: int,
) -> torch.Tensor:
    """See the contract."""
    factor, (indices, grad_output) = kept_samples(clip_factor, indices, grad_output)
    grads = embedding_grad_sample(indices, grad_output, num_embeddings, padding_idx)
    return torch.einsum("b,bvd->vd", factor.to(grads.dtype), grads)
