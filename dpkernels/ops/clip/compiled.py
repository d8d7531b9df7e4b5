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
    return _finish([out], [grad_sample], [clip_factor], 0.0, 1.0, _NO_KEY, [0], [True])[0]


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
    return finish_grads_(
        [out], [grad_sample], [clip_factor], noise_std, scale, key, [block], [accumulate]
    )[0]


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
    key_bytes = native.key_bytes(key)
    return _finish(
        outs, grad_samples, clip_factors, noise_std, scale, key_bytes, blocks, accumulate
    )


def _finish(
    outs: list[torch.Tensor],
    grad_samples: list[torch.Tensor],
    clip_factors: list[torch.Tensor],
    noise_std: float,
    scale: float,
    key: bytes,
    blocks: list[int],
    accumulate: list[bool],
) -> list[torch.Tensor]:
    if not outs:
        return outs
    flat = [out.detach().contiguous() for out in outs]
    samples = [grad_sample.detach().contiguous() for grad_sample in grad_samples]
    factors = [
        factor.detach().to(result_dtype(out)).contiguous()
        for factor, out in zip(clip_factors, outs, strict=True)
    ]
    table = [
        (
            out.data_ptr(),
            native.dtype_code(out.dtype),
            sample.data_ptr(),
            native.dtype_code(sample.dtype),
            factor.data_ptr(),
            len(factor),
            out.numel(),
            block,
            add,
        )
        for out, sample, factor, block, add in zip(
            flat, samples, factors, blocks, accumulate, strict=True
        )
    ]
    native.extension(flat[0]).finish_grads(table, noise_std, scale, key, native.launch_on(flat[0]))
    return [native.write_back(out, result) for out, result in zip(outs, flat, strict=True)]
