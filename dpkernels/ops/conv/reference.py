"""Plain and slow: one sum over positions per kernel tap, straight from the definition."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from dpkernels.ops.checks import result_dtype
from dpkernels.ops.conv.geometry import Geometry
from dpkernels.ops.from_gradients import clipped_grad_by, norm_sq_by


def conv_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """See the contract."""
    dtype = result_dtype(input, grad_output)
    batch, groups = input.shape[0], geometry.groups
    channels_in, channels_out = geometry.channels
    spatial = grad_output.shape[2:]
    result = input.new_zeros((batch, *geometry.weight_shape), dtype=dtype)
    if 0 in spatial or batch == 0:
        return result
    padded = F.pad(input.to(dtype), [n for p in reversed(geometry.padding) for n in (p, p)])
    grads = grad_output.to(dtype).reshape(batch, groups, channels_out, -1)
    taps = itertools.product(*(range(size) for size in geometry.kernel))
    for index, tap in enumerate(taps):
        starts = [at * step for at, step in zip(tap, geometry.dilation, strict=True)]
        seen = padded
        for axis, (start, size) in enumerate(zip(starts, spatial, strict=True)):
            step = geometry.stride[axis]
            last = start + (size - 1) * step
            seen = seen.index_select(2 + axis, torch.arange(start, last + 1, step).to(seen.device))
        seen = seen.reshape(batch, groups, channels_in, -1)
        tap_grad = torch.einsum("bgot,bgit->bgoi", grads, seen)
        result.flatten(3)[..., index] = tap_grad.flatten(1, 2)
    return result


conv_norm_sq = norm_sq_by(conv_grad_sample)
conv_clipped_grad = clipped_grad_by(conv_grad_sample)
