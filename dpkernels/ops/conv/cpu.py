"""CPU convolution gradients by library calls.

The library computes one batch's weight gradient per call; sample b's own gradient is group b of a
convolution whose batch is folded into its groups, or one call per sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dpkernels.ops.checks import kept_samples, result_dtype
from dpkernels.ops.conv import gram, output_size

SCRATCH_ELEMENTS = 1 << 23


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
    input, grad_output = _operands(input, grad_output, weight_shape, stride, padding, dilation)
    geometry = (list(weight_shape), list(stride), list(padding), list(dilation), groups)
    if input.numel() == 0 or grad_output.numel() == 0:
        return input.new_zeros((input.shape[0], *weight_shape))
    return grouped_grad_sample(input, grad_output, *geometry)


def grouped_grad_sample(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """One call for the batch, samples folded into groups."""
    batch = input.shape[0]
    channels_out, *rest = weight_shape
    grads = batch_grad(
        input.reshape(1, -1, *input.shape[2:]),
        grad_output.reshape(1, -1, *grad_output.shape[2:]),
        [batch * channels_out, *rest],
        stride,
        padding,
        dilation,
        batch * groups,
    )
    return grads.view(batch, channels_out, *rest)


def looped_grad_sample(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """One call per sample."""
    result = input.new_empty((input.shape[0], *weight_shape))
    for sample, (seen, grad) in enumerate(zip(input.split(1), grad_output.split(1))):
        result[sample] = batch_grad(seen, grad, weight_shape, stride, padding, dilation, groups)
    return result


def batch_grad(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """The library's weight gradient, summed over the batch: [*weight_shape], contiguous."""
    grads = torch.ops.aten.convolution_backward(
        grad_output,
        input,
        input.new_empty(weight_shape),
        None,
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        groups,
        [False, True, False],
    )
    return grads[1].contiguous()


def conv_norm_sq(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """See the contract. Gram over channels or the gradient itself, whichever costs fewer FLOP."""
    geometry = (list(weight_shape), list(stride), list(padding), list(dilation), groups)
    if input.numel() == 0 or grad_output.numel() == 0:
        return input.new_zeros(input.shape[0], dtype=result_dtype(input, grad_output))
    if gram.is_cheaper(input.shape, grad_output.shape, *geometry):
        dtype = result_dtype(input, grad_output)
        return gram.channel_gram_norm_sq(input.to(dtype), grad_output.to(dtype), *geometry)
    chunk = max(1, SCRATCH_ELEMENTS // max(1, _product(weight_shape)))
    parts = (
        conv_grad_sample(seen, grad, *geometry).flatten(1)
        for seen, grad in zip(input.split(chunk), grad_output.split(chunk))
    )
    return torch.cat([torch.linalg.vector_norm(part, dim=1).square_() for part in parts])


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
    factor, operands = kept_samples(clip_factor, input, grad_output)
    input, grad_output = _operands(*operands, weight_shape, stride, padding, dilation)
    if input.numel() == 0 or grad_output.numel() == 0:
        return input.new_zeros(tuple(weight_shape))
    factor = factor.to(input.dtype).view(-1, *[1] * (input.ndim - 1))
    if grad_output.numel() <= input.numel():
        grad_output = grad_output * factor
    else:
        input = input * factor
    return batch_grad(
        input,
        grad_output,
        list(weight_shape),
        list(stride),
        list(padding),
        list(dilation),
        groups,
    )


def _operands(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the result's dtype, grad_output zero-padded to every window that input has.

    The library derives the output's size from the input's. Windows that the layer never computed
    have gradient zero.
    """
    dtype = result_dtype(input, grad_output)
    geometry = zip(weight_shape[2:], stride, padding, dilation)
    windows = [output_size(size, *axis) for size, axis in zip(input.shape[2:], geometry)]
    missing = [have - got for have, got in zip(windows, grad_output.shape[2:])]
    if any(missing):
        grad_output = F.pad(grad_output, [n for short in reversed(missing) for n in (0, short)])
    return input.to(dtype), grad_output.to(dtype)


def _product(values: list[int]) -> int:
    return torch.Size(values).numel()
