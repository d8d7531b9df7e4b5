"""Clip factors and the end of a DP step by the compiled kernels (csrc/*/clip.*)."""

from __future__ import annotations

import torch

from dpkernels.ops import native
from dpkernels.ops.checks import result_dtype
from dpkernels.ops.clip.records import Finish, Places, Sums


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


def finish_grads_(sums: Sums, finish: Finish, places: Places) -> None:
    if not sums.outs:
        return
    flat = [out.detach().contiguous() for out in sums.outs]
    samples = [grad_sample.detach().contiguous() for grad_sample in sums.grad_samples]
    factors = [
        factor.detach().to(result_dtype(out)).contiguous()
        for factor, out in zip(sums.clip_factors, flat, strict=True)
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
        for out, sample, factor, block, add in zip(flat, samples, factors, *places, strict=True)
    ]
    noise_std, scale, key = finish
    extension, launch = native.extension(flat[0]), native.launch_on(flat[0])
    extension.finish_grads(table, noise_std, scale, native.key_bytes(key), launch)
    for out, result in zip(sums.outs, flat, strict=True):
        native.write_back(out, result)
