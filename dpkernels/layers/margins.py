"""How far rounding may put the norm of a clipped contribution above the computed norm.

Clipping is sound where the vector that is summed has norm at most C as computed. Each function
returns an upper bound on that vector's norm before its clip factor; factors are taken from the
bounds. docs/math.md, section 1, derives them. ``unit`` is half the distance from 1 to the next
number of the dtype in which norms and sums are accumulated.
"""

from __future__ import annotations

import math

import torch

from dpkernels.ops.checks import result_dtype
from dpkernels.ops.conv.geometry import Geometry
from dpkernels.ops.precision import float32_products
from dpkernels.ops.sums import squared_norms

#: units of rounding between the values that are summed and their norm, all scaling included
_VALUE_UNITS = 160
#: units of rounding of the sum over a tile of Gram products
_TILE_UNITS = 128
#: largest relative error to which inputs of float32 products are rounded, by their precision
_ROUNDED_TO = {"ieee": 0.0, "tf32": 2.0**-11, "bf16": 2.0**-9}


def unit(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def product_unit(tensor: torch.Tensor, convolution: bool = False) -> float:
    """Largest relative error to which inputs of float32 products are rounded; 0 if they are not.

    Half-precision operands are float32 in a product on a CPU: widened, and scaled by clip factors.
    """
    if result_dtype(tensor) == torch.float64 or (tensor.is_cuda and tensor.dtype.itemsize < 4):
        return 0.0
    kinds = ("matmul", "conv") if convolution else ("matmul",)
    return _ROUNDED_TO[float32_products(tensor.device.type, *kinds)]


def of_values(norm_sq: torch.Tensor) -> torch.Tensor:
    """[B]: the norms came from the very values that are summed."""
    return norm_sq.double().sqrt() * (1.0 + _VALUE_UNITS * unit(norm_sq.dtype))


def of_values_sq(norm_sq: torch.Tensor) -> torch.Tensor:
    """[B], dtype of `norm_sq`: the square of :func:`of_values`, in one operation."""
    return norm_sq * (1.0 + _VALUE_UNITS * unit(norm_sq.dtype)) ** 2


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

    An inner product of n terms is off by at most n units of rounding of its terms' absolute sum,
    in whatever order they are added: pairwise in a library's product, one feature after the other
    in csrc/cpu/linear.cpp, which multiplies and adds the products of a tile in float64.

    Args:
        norm_sq: [B], as computed.
        magnitude: [B], at least the sum over positions of |A_t| |G_t|: its square is what the
            Gram's terms add up to in absolute value, and it bounds the summed products.
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
    positions = grads.shape[1]
    return of_values(norm_sq) + 2 * (positions + 2) * step * math.sqrt(positions) * _norms(grads)


def magnitude(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[B], float64: at least the sum over positions of |A_t| |G_t| (Cauchy and Schwarz).

    Args:
        left: [B, ...], the activations at all positions.
        right: [B, ...], the gradients at all positions.
    """
    return _norms(left) * _norms(right)


def conv_magnitude(
    input: torch.Tensor, backprops: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """[B], float64: the same for a convolution's patches, root sum of squares over groups.

    A value of the input stands in at most one patch per tap, and per axis without dilation in at
    most kernel / stride of them, rounded up.
    """
    axes = zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    patches = math.prod(-(-k // s) if d == 1 else k for k, s, d in axes)
    return math.sqrt(patches) * magnitude(input, backprops)


def _norms(tensor: torch.Tensor) -> torch.Tensor:
    """[B], float64: norms of the rows of a tensor [B, ...]."""
    return of_values(squared_norms(tensor.to(result_dtype(tensor))))
