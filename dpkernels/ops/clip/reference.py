"""Clip factors and the end of a DP step in plain torch."""

from __future__ import annotations

import torch

from dpkernels.ops.checks import kept_samples, result_dtype
from dpkernels.ops.noise.reference import noise_like


def clip_factor(norm_sq: torch.Tensor, max_grad_norm: float, gamma: float = 0.0) -> torch.Tensor:
    norm = norm_sq.double().clamp(min=0.0).sqrt()
    shrink = 1.0 - 2.0 * torch.finfo(norm_sq.dtype).eps
    factor = max_grad_norm / (norm + gamma) * shrink
    if gamma == 0:
        factor = torch.where(norm <= max_grad_norm, 1.0, factor)
    return torch.where(norm.isfinite(), factor, 0.0).to(norm_sq.dtype)


def weighted_sum_(
    out: torch.Tensor, grad_sample: torch.Tensor, clip_factor: torch.Tensor
) -> torch.Tensor:
    with torch.no_grad():
        return out.copy_(out.to(result_dtype(out)) + _clipped_sum(out, grad_sample, clip_factor))


def finish_grad_(
    out: torch.Tensor,
    grad_sample: torch.Tensor,
    clip_factor: torch.Tensor,
    noise_std: float,
    scale: float,
    key: torch.Tensor,
    block: int,
    accumulate: bool,
) -> torch.Tensor:
    with torch.no_grad():
        total = _clipped_sum(out, grad_sample, clip_factor)
        if accumulate:
            total = total + out.to(total.dtype)
        if noise_std != 0:
            total = total + noise_std * noise_like(out, key, block).to(total.dtype)
        return out.copy_(scale * total)


def finish_grads_(
    outs: list[torch.Tensor],
    grad_samples: list[torch.Tensor],
    clip_factors: list[torch.Tensor],
    noise_std: float,
    scale: float,
    key: torch.Tensor,
    blocks: list[int],
    accumulate: list[bool],
) -> list[torch.Tensor]:
    for out, samples, factor, block, add in zip(
        outs, grad_samples, clip_factors, blocks, accumulate, strict=True
    ):
        finish_grad_(out, samples, factor, noise_std, scale, key, block, add)
    return outs


def _clipped_sum(
    out: torch.Tensor, grad_sample: torch.Tensor, clip_factor: torch.Tensor
) -> torch.Tensor:
    dtype = result_dtype(out)
    factor, (samples,) = kept_samples(clip_factor, grad_sample)
    return torch.tensordot(factor.to(dtype), samples.to(dtype), dims=1)
