"""Embedding gradients on the CPU (csrc/cpu/embedding.cpp): no copy of the operands.

The two that fill a table raise ``IndexError`` for an index that the table does not have.
"""

from __future__ import annotations

from typing import Any

import torch

from dpkernels.ops import native
from dpkernels.ops.checks import result_dtype
from dpkernels.ops.embedding.table import Table

unavailable = native.why_not_cpu


def embedding_norm_sq(
    indices: torch.Tensor, grad_output: torch.Tensor, padding_idx: int
) -> torch.Tensor:
    """See the contract. Equal indices of a sample come together by sorting."""
    result = grad_output.new_empty(len(indices), dtype=result_dtype(grad_output))
    return _run("embedding_norm_sq", result, indices, grad_output, padding_idx)


def embedding_grad_sample(
    indices: torch.Tensor, grad_output: torch.Tensor, table: Table
) -> torch.Tensor:
    """See the contract."""
    rows, padding_idx = table
    shape = (len(indices), rows, grad_output.shape[2])
    result = grad_output.new_zeros(shape, dtype=result_dtype(grad_output))
    return _run("embedding_grad_sample", result, indices, grad_output, padding_idx, rows)


def embedding_clipped_grad(
    indices: torch.Tensor, grad_output: torch.Tensor, clip_factor: torch.Tensor, table: Table
) -> torch.Tensor:
    """See the contract."""
    dtype = result_dtype(grad_output)
    rows, padding_idx = table
    result = grad_output.new_zeros((rows, grad_output.shape[2]), dtype=dtype)
    factor = clip_factor.detach().to(dtype).contiguous()
    added = (factor.data_ptr(), rows)
    return _run("embedding_clipped_grad", result, indices, grad_output, padding_idx, *added)


def _run(
    kernel: str,
    result: torch.Tensor,
    indices: torch.Tensor,
    grad_output: torch.Tensor,
    padding_idx: int,
    *added: Any,
) -> torch.Tensor:
    """Call a kernel with a gradient whose last axis is contiguous; `added`: a table's arguments."""
    grads = native.features_adjacent(grad_output)
    getattr(native.extension(grads), kernel)(
        result.data_ptr(),
        indices.data_ptr(),
        grads.data_ptr(),
        native.dtype_code(grads.dtype),
        *added,
        (*grads.shape, padding_idx, indices.stride(), grads.stride()[:2]),
        native.launch_on(grads),
    )
    return result
