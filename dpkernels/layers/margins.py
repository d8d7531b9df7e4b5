"""How far rounding may put the norm of a clipped contribution above the computed norm.

Clipping is sound where the vector that is summed has norm at most C as computed. Each function
returns an upper bound on that vector's norm before its clip factor; factors are taken from the
bounds. docs/math.md, section 1, derives them. ``unit`` is half the distance from 1 to the next
number of the dtype in which norms and sums are accumulated.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dpkernels.ops.checks import result_dtype
from dpkernels.ops.conv.geometry import Geometry

#: units of rounding between the values that are summed and their norm, all scaling included
_VALUE_UNITS = 160
#: units of rounding of the sum over a tile of Gram products
_TILE_UNITS = 128
#: unit of the products' inputs by ``torch.get_float32_matmul_precision()``: TF32, bfloat16
_REDUCED = {"high": 2.0**-11, "medium": 2.0**-9}


def unit(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def product_unit(tensor: torch.Tensor, convolution: bool = False) -> float:
    """Largest relative error to which inputs of float32 products are rounded; 0 if they are not."""
    if result_dtype(tensor) == torch.float64 or tensor.dtype.itemsize < 4:
        return 0.0
    if tensor.is_cuda and (
        torch.backends.cuda.matmul.allow_tf32 or (convolution and torch.backends.cudnn.allow_tf32)
    ):
        return _REDUCED["high"]
    return _REDUCED.get(torch.get_float32_matmul_precision(), 0.0)


def of_values(norm_sq: torch.Tensor) -> torch.Tensor:
    """[B]: the norms came from the very values that are summed."""
    return norm_sq.double().sqrt() * (1.0 + _VALUE_UNITS * unit(norm_sq.dtype))


def of_outer_product(norm_sq: torch.Tensor, inputs: float) -> torch.Tensor:
    """[B]: one position, so that the norm is a product of two norms.

    Args:
        norm_sq: [B].
        inputs: as :func:`product_unit`.
    """
    return of_values(norm_sq) * (1.0 + 4.0 * inputs)


def of_gram(
    norm_sq: torch.Tensor, magnitude: torch.Tensor, positions: int, features: int
) -> torch.Tensor:
    """[B]: the norm came from Gram products, where terms of either sign may cancel.

    Args:
        norm_sq: [B], as computed.
        magnitude: [B], sum over positions of |A_t| |G_t|: its square is what the Gram's terms add
            up to in absolute value, and it bounds the entries of the summed products.
        positions: T, the length of the sums that form the gradient.
        features: I + O, the lengths of the two Grams' inner products; for a convolution the
            channels of a group and the number of taps, over which sums are taken one by one.
    """
    step = unit(norm_sq.dtype)
    gram = (features + _TILE_UNITS) * step
    magnitude = magnitude.double()
    summed = (positions + 2) * step * magnitude
    return of_values((norm_sq.double() + gram * magnitude.square()).to(norm_sq.dtype)) + summed


def of_segments(norm_sq: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """[B]: rows of an embedding, summed over equal indices in two orders.

    Args:
        norm_sq: [B].
        grads: [B, T, D], gradients at the positions.
    """
    if grads.shape[1] == 1:
        return of_values(norm_sq)
    step = unit(norm_sq.dtype)
    return of_values(norm_sq) + 2 * (grads.shape[1] + 2) * step * _norms(grads, 2).sum(1)


def linear_magnitude(activations: torch.Tensor, backprops: torch.Tensor) -> torch.Tensor:
    """[B], float64: sum over positions of |A_t| |G_t| for [B, T, I] and [B, T, O]."""
    return (_norms(activations, 2) * _norms(backprops, 2)).sum(1)


def conv_magnitude(
    input: torch.Tensor, backprops: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """[B], float64: the same for a convolution's patches, root sum of squares over groups."""
    groups, axes = geometry.groups, geometry.axes
    energy = _norms(input.unflatten(1, (groups, -1)), 2).square()
    taps = torch.ones((groups, 1, *geometry.kernel), dtype=energy.dtype, device=energy.device)
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    patches = convolution(
        energy, taps, None, geometry.stride, geometry.padding, geometry.dilation, groups
    )
    grads = _norms(backprops.unflatten(1, (groups, -1)), 2)
    for axis, size in enumerate(grads.shape[2:]):
        patches = patches.narrow(2 + axis, 0, size)
    by_group = (patches.clamp(min=0).sqrt() * grads).flatten(2).sum(2)
    return torch.linalg.vector_norm(by_group, dim=1)


def _norms(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """Norms along an axis, float64."""
    dtype = result_dtype(tensor)
    return torch.linalg.vector_norm(tensor, dim=axis, dtype=dtype).double()
