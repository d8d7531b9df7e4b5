"""Plain and slow: every per-sample gradient is formed position by position's definition."""

from __future__ import annotations

import torch

from dpkernels.ops.checks import result_dtype
from dpkernels.ops.from_gradients import clipped_grad_by, norm_sq_by


def linear_grad_sample(activations: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    dtype = result_dtype(activations, grad_output)
    rows = (
        grad.to(dtype).T @ act.to(dtype) for act, grad in zip(activations, grad_output, strict=True)
    )
    empty = (0, grad_output.shape[2], activations.shape[2])
    return (
        torch.stack(list(rows)) if len(activations) else grad_output.new_empty(empty, dtype=dtype)
    )


linear_norm_sq = norm_sq_by(linear_grad_sample)
linear_clipped_grad = clipped_grad_by(linear_grad_sample)
