"""Embedding tables: per-sample norms and gradients of a table [V, D] looked up at T positions.

A sample's gradient row v is the sum of its output gradients over the positions that hold index v
(docs/math.md section 2). Positions that hold `padding_idx` do not count.
"""

from __future__ import annotations

import torch

from dpkernels.ops.checks import check_clipped, require_float, require_shape, result_dtype
from dpkernels.ops.embedding.table import Table
from dpkernels.ops.registry import contract


def _check_norm(indices: torch.Tensor, grad_output: torch.Tensor, padding_idx: int) -> None:
    if indices.dtype != torch.int64 or indices.ndim != 2:
        raise ValueError(
            f"indices: {indices.dtype} {list(indices.shape)}, expected int64 with 2 axes [B, T]"
        )
    require_float("grad_output", grad_output, 3)
    require_shape("grad_output", grad_output, [*indices.shape, grad_output.shape[2]])
    if padding_idx < -1:
        raise ValueError(f"padding_idx={padding_idx}: expected -1 for none, or an index")


def _check_table(indices: torch.Tensor, grad_output: torch.Tensor, table: Table) -> None:
    num_embeddings, padding_idx = table
    _check_norm(indices, grad_output, padding_idx)
    if num_embeddings < 1 or padding_idx >= num_embeddings:
        raise ValueError(
            f"num_embeddings={num_embeddings}: expected at least 1 and more than"
            f" padding_idx={padding_idx}"
        )


@contract(check=_check_norm)
def embedding_norm_sq(
    indices: torch.Tensor, grad_output: torch.Tensor, padding_idx: int
) -> torch.Tensor:
    """Squared norm of each sample's table gradient; no [B, V, D] and nothing T x T.

    Args:
        indices: [B, T], int64, 0 <= index < V, any strides.
        grad_output: [B, T, D], the gradient at the looked-up rows.
        padding_idx: positions with this index are left out; -1 for none.

    Returns:
        [B], float32 (float64 if grad_output is).

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    return grad_output.new_empty((indices.shape[0],), dtype=result_dtype(grad_output))


@contract(check=_check_table)
def embedding_grad_sample(
    indices: torch.Tensor, grad_output: torch.Tensor, table: Table
) -> torch.Tensor:
    """Per-sample table gradients.

    Args:
        indices: [B, T], int64.
        grad_output: [B, T, D].
        num_embeddings: V.
        padding_idx: positions with this index are left out; -1 for none.

    Returns:
        [B, V, D], float32 (float64 if grad_output is).
    """
    shape = (indices.shape[0], table.num_embeddings, grad_output.shape[2])
    return grad_output.new_empty(shape, dtype=result_dtype(grad_output))


@contract(check=check_clipped(_check_table))
def embedding_clipped_grad(
    indices: torch.Tensor, grad_output: torch.Tensor, clip_factor: torch.Tensor, table: Table
) -> torch.Tensor:
    """Sum over samples of clip_factor[b] times sample b's table gradient.

    Args:
        indices: [B, T], int64.
        grad_output: [B, T, D].
        clip_factor: [B], float32 or float64. A sample whose factor is 0 is left out, even where
            its values are not finite.
        num_embeddings: V.
        padding_idx: positions with this index are left out; -1 for none.

    Returns:
        [V, D], float32 (float64 if grad_output is).
    """
    shape = (table.num_embeddings, grad_output.shape[2])
    return grad_output.new_empty(shape, dtype=result_dtype(grad_output))
