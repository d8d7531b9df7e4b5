"""Plain and slow: every per-sample gradient is formed position by position's definition."""

from __future__ import annotations

import torch

from dpkernels.ops.checks import kept_samples, result_dtype


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


def linear_norm_sq(activations: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    return linear_grad_sample(activations, grad_output).square().sum((1, 2))


def linear_clipped_grad(
    activations: torch.Tensor, grad_output: torch.Tensor, clip_factor: torch.Tensor
) -> torch.Tensor:
    """See the contract."""
    factor, (activations, grad_output) = kept_samples(clip_factor, activations, grad_output)
    grads = linear_grad_sample(activations, grad_output)
    return (grads * factor.to(grads.dtype)[:, None, None]).sum(0)
