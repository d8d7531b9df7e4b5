"""Per-sample convolution gradients by library calls.

The library computes one batch's weight gradient per call. Sample b's own gradient is group b of a
convolution whose batch is folded into its groups, or one call per sample, or, for a kernel of one
tap, a plain batched matrix product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dpkernels.ops.conv import output_size
from dpkernels.ops.conv.geometry import Geometry


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
    return torch.bmm(grads, seen.reshape(rows, channels_in, -1).transpose(1, 2)).view(
        input.shape[0], *geometry.weight_shape
    )


def grouped_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """One call for the batch, samples folded into groups."""
    batch = input.shape[0]
    channels_out, *rest = geometry.weight_shape
    folded = Geometry(
        (batch * channels_out, *rest),
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        batch * geometry.groups,
    )
    grads = batch_grad(input.flatten(0, 1)[None], grad_output.flatten(0, 1)[None], folded)
    return grads.view(batch, *geometry.weight_shape)


def looped_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """One call per sample."""
    result = input.new_empty((input.shape[0], *geometry.weight_shape))
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
    per_axis = zip(
        geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True
    )
    windows = [
        output_size(size, *axis) for size, axis in zip(input.shape[2:], per_axis, strict=True)
    ]
    missing = [have - got for have, got in zip(windows, grad_output.shape[2:], strict=True)]
    if not any(missing):
        return grad_output
    return F.pad(grad_output, [n for short in reversed(missing) for n in (0, short)])
