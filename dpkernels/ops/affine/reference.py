"""Plain and slow: products formed in full, then summed."""

from __future__ import annotations

import torch

from dpkernels.ops.checks import result_dtype
from dpkernels.ops.from_gradients import clipped_grad_by, norm_sq_by


def affine_grad_sample(normalized: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    dtype = result_dtype(normalized, grad_output)
    return (normalized.to(dtype) * grad_output.to(dtype)).sum(2)


def bias_grad_sample(grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    return grad_output.to(result_dtype(grad_output)).sum(2)


def normalization_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """See the contract."""
    dtype = result_dtype(input, grad_output)
    channels = input.shape[1] // mean.shape[1]
    mean, rstd = (
        stat.to(dtype).repeat_interleave(channels, dim=1).unsqueeze(2) for stat in (mean, rstd)
    )
    normalized = (input.to(dtype) - mean) * rstd
    return torch.stack([affine_grad_sample(normalized, grad_output), bias_grad_sample(grad_output)])


def normalization_last_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """See the contract."""
    dtype = result_dtype(input, grad_output)
    normalized = (input.to(dtype) - mean.to(dtype).unsqueeze(2)) * rstd.to(dtype).unsqueeze(2)
    normalized, grads = normalized.transpose(1, 2), grad_output.transpose(1, 2)
    return torch.stack([affine_grad_sample(normalized, grads), bias_grad_sample(grads)])


def normalization_statistics(input: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """See the contract."""
    batch, channels, positions = input.shape
    count = channels // groups * positions
    rows = input.to(result_dtype(input)).reshape(batch, groups, count)
    mean = rows.sum(2) / count
    variance = (rows - mean.unsqueeze(2)).square().sum(2) / count
    return torch.stack([mean, 1 / (variance + eps).sqrt()])


affine_norm_sq = norm_sq_by(affine_grad_sample)
affine_clipped_grad = clipped_grad_by(affine_grad_sample)
