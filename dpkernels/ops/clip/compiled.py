"""Clip factors and the end of a DP step by the compiled kernels (csrc/*/clip.*)."""

from __future__ import annotations

import torch

from dpkernels.ops import native
from dpkernels.ops.checks import result_dtype

_NO_KEY = bytes(32)


def clip_factor(norm_sq: torch.Tensor, max_grad_norm: float, gamma: float = 0.0) -> torch.Tensor:
    squares = norm_sq.detach().contiguous()
    factor = torch.empty_like(squares)
    native.extension(squares).clip_factor(
        factor.data_ptr(),
        squares.data_ptr(),
        native.dtype_code(squares.dtype),
        len(squares),
        max_grad_norm,
        gamma,
        native.launch_on(squares),
    )
    return factor


def weighted_sum_(
    out: torch.Tensor, grad_sample: torch.Tensor, clip_factor: torch.Tensor
) -> torch.Tensor:
    return _finish(out, grad_sample, clip_factor, 0.0, 1.0, _NO_KEY, 0, True)


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
    key_bytes = native.key_bytes(key)
    return _finish(out, grad_sample, clip_factor, noise_std, scale, key_bytes, block, accumulate)


def _finish(
    out: torch.Tensor,
    grad_sample: torch.Tensor,
    clip_factor: torch.Tensor,
    noise_std: float,
    scale: float,
    key: bytes,
    block: int,
    accumulate: bool,
) -> torch.Tensor:
    flat = out.detach().contiguous()
    samples = grad_sample.detach().contiguous()
    factor = clip_factor.detach().to(result_dtype(out)).contiguous()
    native.extension(flat).finish_grad(
        flat.data_ptr(),
        native.dtype_code(flat.dtype),
        samples.data_ptr(),
        native.dtype_code(samples.dtype),
        factor.data_ptr(),
        len(factor),
        flat.numel(),
        noise_std,
        scale,
        key,
        block,
        accumulate,
        native.launch_on(flat),
    )
    return native.write_back(out, flat)
