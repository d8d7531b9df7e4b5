"""Plain and slow: one sum over positions per kernel tap, straight from the definition."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from dpkernels.ops.checks import kept_samples, result_dtype


def conv_grad_sample(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """See the contract."""
    dtype = result_dtype(input, grad_output)
    batch = input.shape[0]
    channels_out, channels_in, *kernel = weight_shape
    spatial = grad_output.shape[2:]
    result = input.new_zeros((batch, *weight_shape), dtype=dtype)
    if 0 in spatial or batch == 0:
        return result
    padded = F.pad(input.to(dtype), [n for axis in reversed(padding) for n in (axis, axis)])
    grads = grad_output.to(dtype).reshape(batch, groups, channels_out // groups, -1)
    for index, tap in enumerate(itertools.product(*(range(size) for size in kernel))):
        starts = [at * step for at, step in zip(tap, dilation, strict=True)]
        seen = padded
        for axis, (start, size, step) in enumerate(zip(starts, spatial, stride, strict=True)):
            last = start + (size - 1) * step
            seen = seen.index_select(2 + axis, torch.arange(start, last + 1, step).to(seen.device))
        seen = seen.reshape(batch, groups, channels_in, -1)
        tap_grad = torch.einsum("bgot,bgit->bgoi", grads, seen)
        result.flatten(3)[..., index] = tap_grad.reshape(batch, channels_out, channels_in)
    return result


def conv_norm_sq(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """See the contract."""
    grads = conv_grad_sample(input, grad_output, weight_shape, stride, padding, dilation, groups)
    return grads.flatten(1).square().sum(1)


def conv_clipped_grad(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    clip_factor: torch.Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """See the contract."""
    factor, (input, grad_output) = kept_samples(clip_factor, input, grad_output)
    grads = conv_grad_sample(input, grad_output, weight_shape, stride, padding, dilation, groups)
    return torch.einsum("b,b...->...", factor.to(grads.dtype), grads)
