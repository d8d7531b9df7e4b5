"""CPU gradients of scales and shifts: compiled reductions where there are any, else the library."""

from __future__ import annotations

import torch

from dpkernels.ops import native
from dpkernels.ops.affine import compiled, library
from dpkernels.ops.checks import kept_samples

_reductions = compiled if native.why_not_cpu() is None else library

affine_grad_sample = _reductions.affine_grad_sample
affine_last_grad_sample = _reductions.affine_last_grad_sample
bias_grad_sample = _reductions.bias_grad_sample
bias_last_grad_sample = _reductions.bias_last_grad_sample
normalization_grad_sample = _reductions.normalization_grad_sample
normalization_last_grad_sample = _reductions.normalization_last_grad_sample
normalization_statistics = _reductions.normalization_statistics


def affine_norm_sq(normalized: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    return affine_grad_sample(normalized, grad_output).square().sum(1)


def affine_clipped_grad(
    normalized: torch.Tensor, grad_output: torch.Tensor, clip_factor: torch.Tensor
) -> torch.Tensor:
    """See the contract."""
    factor, operands = kept_samples(clip_factor, normalized, grad_output)
    grads = affine_grad_sample(*operands)
    return factor.to(grads.dtype) @ grads
