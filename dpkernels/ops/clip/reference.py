"""Clip factors and the end of a DP step in plain torch."""

from __future__ import annotations

import torch

from dpkernels.ops.checks import kept_samples, result_dtype
from dpkernels.ops.clip.records import Finish, Places, Sums
from dpkernels.ops.noise.reference import noise_like


def clip_factor(norm_sq: torch.Tensor, max_grad_norm: float, gamma: float = 0.0) -> torch.Tensor:
    norm = norm_sq.double().clamp(min=0.0).sqrt()
    shrink = 1.0 - 2.0 * torch.finfo(norm_sq.dtype).eps
    factor = max_grad_norm / (norm + gamma) * shrink
    if gamma == 0:
        factor = torch.where(norm <= max_grad_norm, 1.0, factor)
    return torch.where(norm.isfinite(), factor, 0.0).to(norm_sq.dtype)


def finish_grads_(sums: Sums, finish: Finish, places: Places) -> None:
    noise_std, scale, key = finish
    with torch.no_grad():
        for out, grad_sample, factor, block, add in zip(*sums, *places, strict=True):
            dtype = result_dtype(out)
            factor, (samples,) = kept_samples(factor, grad_sample)
            total = torch.tensordot(factor.to(dtype), samples.to(dtype), dims=1)
            if add:
                total = total + out.to(dtype)
            if noise_std != 0:
                total = total + noise_std * noise_like(out, key, block).to(dtype)
            out.copy_(scale * total)
