"""Embedding gradients by the compiled kernels (csrc/cpu/embedding.cpp): no copy of the operands.

The two that fill a table raise ``IndexError`` for an index that the table does not have.
"""

from __future__ import annotations

from typing import Any

import torch

from dpkernels.ops import native
from dpkernels.ops.checks import result_dtype


def embedding_norm_sq(
    indices: torch.Tensor, grad_output: torch.Tensor, padding_idx: int
) -> torch.Tensor:
    """See the contract. Equal indices of a sample come together by sorting."""
    result = grad_output.new_empty(len(indices), dtype=result_dtype(grad_output))
    return _run("embedding_norm_sq", result, indices, grad_output, padding_idx)


def embedding_grad_sample(
    indices: torch.Tensor, grad_output: torch.Tensor, num_embeddings: int, padding_idx: int
) -> torch.Tensor:
    """See the contract."""
    shape = (len(indices), num_embeddings, grad_output.shape[2])
    result = grad_output.new_zeros(shape, dtype=result_dtype(grad_output))
    return _run("embedding_grad_sample", result, indices, grad_output, padding_idx, num_embeddings)


def embedding_clipped_grad(
    indices: torch.Tensor,
    grad_output: torch.Tensor,
    clip_factor: torch.Tensor,
    num_embeddings: int,
    padding_idx: int,
) -> torch.Tensor:
    """See the contract."""
    dtype = result_dtype(grad_output)
    result = grad_output.new_zeros((num_embeddings, grad_output.shape[2]), dtype=dtype)
    factor = clip_factor.detach().to(dtype).contiguous()
    table = (factor.data_ptr(), num_embeddings)
    return _run("embedding_clipped_grad", result, indices, grad_output, padding_idx, *table)


def _run(
    kernel: str,
    result: torch.Tensor,
    indices: torch.Tensor,
    grad_output: torch.Tensor,
    padding_idx: int,
    *table: Any,
) -> torch.Tensor:
    """Call a kernel with a gradient whose last axis is contiguous; `table` is what it adds."""
    grads = grad_output.detach()
    grads = grads if grads.stride(2) == 1 else grads.contiguous()
    getattr(native.extension(grads), kernel)(
        result.data_ptr(),
        indices.data_ptr(),
        indices.stride(),
        grads.data_ptr(),
        grads.stride()[:2],
        native.dtype_code(grads.dtype),
        *table,
        tuple(grads.shape),
        padding_idx,
        native.launch_on(grads),
    )
    return result
