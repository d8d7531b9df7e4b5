"""CPU convolution gradients: our tile kernel and library calls, chosen per shape.

The choice depends on shapes and dtype alone, so that the same inputs take the same path.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dpkernels.ops.checks import kept_samples, result_dtype
from dpkernels.ops.conv import gram, library, tiles
from dpkernels.ops.conv.geometry import Geometry

SCRATCH_ELEMENTS = 1 << 20
FOLDED_WEIGHTS = 1 << 21
"""Weights of all samples up to which the library folds the batch into groups well."""

GradSample = Callable[[torch.Tensor, torch.Tensor, Geometry], torch.Tensor]


def strategy(input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry) -> GradSample:
    """The function that forms per-sample gradients fastest for these shapes (by measurement)."""
    if set(geometry.kernel) == {1} and set(geometry.padding) == {0}:
        return library.pointwise_grad_sample
    folds_well = input.shape[0] * geometry.weights <= FOLDED_WEIGHTS
    if tiles.is_faster(input, grad_output, geometry, folds_well):
        return tiles.grad_sample
    return library.grouped_grad_sample if folds_well else library.looped_grad_sample


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
    input, grad_output = _operands(input, grad_output)
    geometry = Geometry.of(weight_shape, stride, padding, dilation, groups)
    if input.numel() == 0 or grad_output.numel() == 0:
        return input.new_zeros((input.shape[0], *weight_shape))
    return strategy(input, grad_output, geometry)(input, grad_output, geometry)


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
    input, grad_output = _operands(input, grad_output)
    geometry = Geometry.of(weight_shape, stride, padding, dilation, groups)
    if input.numel() == 0 or grad_output.numel() == 0:
        return input.new_zeros(input.shape[0])
    if gram.is_cheaper(input.shape, grad_output.shape, geometry):
        return gram.channel_gram_norm_sq(input, grad_output, geometry)
    chunk = max(1, SCRATCH_ELEMENTS // max(1, geometry.weights))
    form = strategy(input[:chunk], grad_output[:chunk], geometry)
    parts = (
        form(seen, grad, geometry).flatten(1)
        for seen, grad in zip(input.split(chunk), grad_output.split(chunk), strict=True)
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
    """See the contract. One weight gradient of the batch, the smaller operand scaled first."""
    factor, operands = kept_samples(clip_factor, input, grad_output)
    input, grad_output = _operands(*operands)
    if input.numel() == 0 or grad_output.numel() == 0:
        return input.new_zeros(tuple(weight_shape))
    factor = factor.to(input.dtype).view(-1, *[1] * (input.ndim - 1))
    if grad_output.numel() <= input.numel():
        grad_output = grad_output * factor
    else:
        input = input * factor
    geometry = Geometry.of(weight_shape, stride, padding, dilation, groups)
    return library.batch_grad(input, grad_output, geometry)


def _operands(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    dtype = result_dtype(*tensors)
    return tuple(tensor.detach().to(dtype) for tensor in tensors)
