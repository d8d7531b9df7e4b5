"""Gradients of scales and shifts by library calls, on any device."""

from __future__ import annotations

import torch

from dpkernels.ops.checks import result_dtype
from dpkernels.ops.from_gradients import clipped_grad_by, norm_sq_by


def affine_grad_sample(normalized: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    dtype = result_dtype(normalized, grad_output)
    return torch.mul(normalized.to(dtype), grad_output.to(dtype)).sum(2)


affine_norm_sq = norm_sq_by(affine_grad_sample)
affine_clipped_grad = clipped_grad_by(affine_grad_sample)


def bias_grad_sample(grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    return grad_output.sum(2, dtype=result_dtype(grad_output))


def normalization_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """See the contract. The mean is taken off before the product: no cancellation."""
    dtype = result_dtype(input, grad_output)
    batch, channels, positions = input.shape
    grads = grad_output.to(dtype)
    grouped = (batch, mean.shape[1], channels // mean.shape[1], positions)
    centred = input.to(dtype).reshape(grouped) - mean.to(dtype)[:, :, None, None]
    weight = centred.mul_(grads.reshape(grouped)).sum(3) * rstd.to(dtype)[:, :, None]
    return torch.stack([weight.reshape(batch, channels), grads.sum(2)])


def normalization_last_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """See the contract."""
    dtype = result_dtype(input, grad_output)
    grads = grad_output.to(dtype)
    normalized = (input.to(dtype) - mean.to(dtype).unsqueeze(2)).mul_(rstd.to(dtype).unsqueeze(2))
    return torch.stack([normalized.mul_(grads).sum(1), grads.sum(1)])


def normalization_statistics(input: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """See the contract."""
    rows = input.to(result_dtype(input)).reshape(
        input.shape[0], groups, input.shape[1] // groups * input.shape[2]
    )
    mean = rows.mean(2)
    variance = (rows - mean.unsqueeze(2)).square_().mean(2)
    return torch.stack([mean, (variance + eps).rsqrt()])
