"""CPU convolution gradients: our tile kernel and library calls, chosen per shape.

The choice depends on shapes and dtype alone, so that the same inputs take the same path.
"""

from __future__ import annotations

import functools

import torch

from dpkernels.ops.conv import library, tiles
from dpkernels.ops.conv.geometry import Geometry
from dpkernels.ops.conv.library import GradSample, conv_clipped_grad

__all__ = ["conv_clipped_grad", "conv_grad_sample", "conv_norm_sq", "strategy"]


def strategy(input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry) -> GradSample:
    """The function that forms per-sample gradients fastest for these shapes (by measurement)."""
    by_library = library.strategy(input, grad_output, geometry)
    if by_library is library.pointwise_grad_sample and not tiles.spare_a_copy(geometry):
        return by_library
    folds_well = by_library is library.grouped_grad_sample
    if tiles.is_faster(input, grad_output, geometry, folds_well):
        return tiles.grad_sample
    return by_library


conv_grad_sample = functools.partial(library.conv_grad_sample, choose=strategy)
conv_norm_sq = functools.partial(library.conv_norm_sq, choose=strategy)
