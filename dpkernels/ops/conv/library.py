"""Per-sample convolution gradients by library calls.

The library computes one batch's weight gradient per call. Sample b's own gradient is group b of a
convolution whose batch is folded into its groups, or one call per sample, or, for a kernel of one
tap, a plain batched matrix product. All of it runs on any device and in float64 too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dpkernels.ops import pages
from dpkernels.ops.checks import kept_samples, result_dtype, why_not_exact
from dpkernels.ops.conv import gram
from dpkernels.ops.conv.geometry import Geometry
from dpkernels.ops.sums import squared_norms

SCRATCH_ELEMENTS = 1 << 20
FOLDED_WEIGHTS = 1 << 21
"""Weights of all samples up to which the library folds the batch into groups well."""

GradSample = Callable[[torch.Tensor, torch.Tensor, Geometry], torch.Tensor]
Strategy = Callable[[torch.Tensor, torch.Tensor, Geometry], GradSample]


def strategy(input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry) -> GradSample:
    """The function below that forms per-sample gradients fastest for these shapes."""
    if set(geometry.kernel) == {1} and set(geometry.padding) == {0}:
        return pointwise_grad_sample
    if input.shape[0] * geometry.weights <= FOLDED_WEIGHTS:
        return grouped_grad_sample
    return looped_grad_sample


def conv_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry, choose: Strategy = strategy
) -> torch.Tensor:
    """See the contract. By the function that `choose` names."""
    input, grad_output = _operands(input, grad_output)
    if input.numel() == 0 or grad_output.numel() == 0:
        return input.new_zeros((input.shape[0], *geometry.weight_shape))
    return choose(input, grad_output, geometry)(input, grad_output, geometry)


def conv_norm_sq(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry, choose: Strategy = strategy
) -> torch.Tensor:
    """See the contract. The Gram over channels where it is cheaper, else gradients by chunks."""
    input, grad_output = _operands(input, grad_output)
    if input.numel() == 0 or grad_output.numel() == 0:
        return input.new_zeros(input.shape[0])
    if gram.is_cheaper(input.shape, grad_output.shape, geometry):
        return gram.channel_gram_norm_sq(input, grad_output, geometry)
    chunk = max(1, SCRATCH_ELEMENTS // max(1, geometry.weights))
    form = choose(input[:chunk], grad_output[:chunk], geometry)
    parts = (
        form(seen, grad, geometry).flatten(1)
        for seen, grad in zip(input.split(chunk), grad_output.split(chunk), strict=True)
    )
    return torch.cat([squared_norms(part) for part in parts])


def conv_clipped_grad(
    input: torch.Tensor, grad_output: torch.Tensor, clip_factor: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """See the contract. One weight gradient of the batch, the smaller operand scaled first."""
    factor, operands = kept_samples(clip_factor, input, grad_output)
    input, grad_output = _operands(*operands)
    if input.numel() == 0 or grad_output.numel() == 0:
        return input.new_zeros(geometry.weight_shape)
    factor = factor.to(input.dtype).view(-1, *[1] * (input.ndim - 1))
    if grad_output.numel() <= input.numel():
        grad_output = grad_output * factor
    else:
        input = input * factor
    return batch_grad(input, grad_output, geometry)


def why_not_conv_norm_sq(
    input: torch.Tensor, grad_output: torch.Tensor, *rest: object
) -> str | None:
    """Why norms and clipped sums of these operands would not be those of the same gradients."""
    return why_not_exact(("matmul", "conv"), input, grad_output)


why_not_conv_clipped_grad = why_not_conv_norm_sq


def _operands(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    dtype = result_dtype(*tensors)
    return tuple(tensor.detach().to(dtype) for tensor in tensors)


def pointwise_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """For kernels of one tap without padding: G_b X_b^T per group."""
    seen = input
    for axis, (size, step) in enumerate(zip(grad_output.shape[2:], geometry.stride, strict=True)):
        seen = seen.narrow(2 + axis, 0, (size - 1) * step + 1)
        seen = seen[(slice(None),) * (2 + axis) + (slice(None, None, step),)]
    channels_in, channels_out = geometry.channels
    rows = input.shape[0] * geometry.groups
    grads = grad_output.reshape(rows, channels_out, -1)
    result = pages.new_empty(input, (rows, channels_out, channels_in))
    torch.bmm(grads, seen.reshape(rows, channels_in, -1).transpose(1, 2), out=result)
    return result.view(input.shape[0], *geometry.weight_shape)


def grouped_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """One call for the batch, samples folded into groups."""
    batch = input.shape[0]
    channels_out, *rest = geometry.weight_shape
    folded = geometry._replace(
        weight_shape=(batch * channels_out, *rest), groups=batch * geometry.groups
    )
    grads = batch_grad(input.flatten(0, 1)[None], grad_output.flatten(0, 1)[None], folded)
    return grads.view(batch, *geometry.weight_shape)


def looped_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """One call per sample."""
    result = pages.new_empty(input, (input.shape[0], *geometry.weight_shape))
    for sample, (seen, grad) in enumerate(zip(input.split(1), grad_output.split(1), strict=True)):
        result[sample] = batch_grad(seen, grad, geometry)
    return result


def batch_grad(input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The library's weight gradient, summed over the batch: [*weight_shape], contiguous."""
    grads = torch.ops.aten.convolution_backward(
        _with_every_window(input, grad_output, geometry),
        input,
        input.new_empty(geometry.weight_shape),
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        [0] * geometry.axes,
        geometry.groups,
        [False, True, False],
    )
    return grads[1].contiguous()


def _with_every_window(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """grad_output zero-padded to every window that `input` has, as the library expects.

    Windows that the layer never computed have gradient zero.
    """
    windows = geometry.windows(input.shape[2:])
    missing = [have - got for have, got in zip(windows, grad_output.shape[2:], strict=True)]
    if not any(missing):
        return grad_output
    return F.pad(grad_output, [n for short in reversed(missing) for n in (0, short)])
