"""Strategies built on library matrix products, on any device.

`linear_norm_sq` chooses between the Gram form and forming the gradient by floating-point
operations (docs/math.md section 2). Neither keeps more than a fixed scratch. Half-precision
operands are widened first, except for per-sample gradients on CUDA devices, where the product
itself takes them and answers in float32.
"""

from __future__ import annotations

import torch

from dpkernels.ops import pages
from dpkernels.ops.checks import kept_samples, result_dtype, why_not_exact
from dpkernels.ops.linear import gram
from dpkernels.ops.sums import squared_norms

SCRATCH_ELEMENTS = 1 << 21
HALF_DTYPES = (torch.bfloat16, torch.float16)


def widened(activations: torch.Tensor, grad_output: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Both in the result's dtype."""
    dtype = result_dtype(activations, grad_output)
    return activations.to(dtype), grad_output.to(dtype)


def why_not_linear_norm_sq(
    activations: torch.Tensor, grad_output: torch.Tensor, *rest: object
) -> str | None:
    """Why norms and clipped sums of these operands would not be those of the same gradients."""
    return why_not_exact(("matmul",), activations, grad_output)


why_not_linear_clipped_grad = why_not_linear_norm_sq


def linear_grad_sample(activations: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    if grad_output.is_cuda and activations.dtype == grad_output.dtype in HALF_DTYPES:
        return torch.bmm(grad_output.transpose(1, 2), activations, out_dtype=torch.float32)
    activations, grad_output = widened(activations.detach(), grad_output.detach())
    sides = grad_output.shape[0], grad_output.shape[2], activations.shape[2]
    result = pages.new_empty(activations, sides)
    multiply = torch.mul if activations.shape[1] == 1 else torch.bmm
    return multiply(grad_output.transpose(1, 2), activations, out=result)


def linear_norm_sq(activations: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    activations, grad_output = widened(activations, grad_output)
    if activations.shape[1] == 1:
        return squared_norms(activations) * squared_norms(grad_output)
    if gram.is_cheaper(activations, grad_output):
        return gram_norm_sq(activations, grad_output)
    return recompute_norm_sq(activations, grad_output)


def gram_norm_sq(activations: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """sum_{t,s} <A_t, A_s><G_t, G_s> over tiles with t <= s; off-diagonal tiles count twice.

    Args:
        activations: [B, T, I], float32 or float64.
        grad_output: [B, T, O], the same dtype.

    Returns:
        [B]. Scratch: two tiles per sample of a chunk, never [B, T, T].
    """
    batch, positions, _ = activations.shape
    norm_sq = activations.new_zeros(batch)
    tile = max(1, min(positions, gram.LIBRARY_TILE))
    chunk = max(1, SCRATCH_ELEMENTS // max(1, 2 * tile * tile))
    for first in range(0, batch, chunk):
        rows = slice(first, first + chunk)
        for start in range(0, positions, tile):
            a_left, g_left = (x[rows, start : start + tile] for x in (activations, grad_output))
            for other in range(start, positions, tile):
                a_right, g_right = (
                    x[rows, other : other + tile].transpose(1, 2)
                    for x in (activations, grad_output)
                )
                products = torch.bmm(a_left, a_right).mul_(torch.bmm(g_left, g_right))
                norm_sq[rows].add_(products.sum((1, 2)), alpha=1 if other == start else 2)
    return norm_sq.clamp_(min=0)


def recompute_norm_sq(activations: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """Form each gradient, square, sum and discard it; `activations` and `grad_output` as above."""
    batch, _, features_in = activations.shape
    chunk = max(1, SCRATCH_ELEMENTS // max(1, features_in * grad_output.shape[2]))
    norm_sq = activations.new_empty(batch)
    for first in range(0, batch, chunk):
        rows = slice(first, first + chunk)
        grads = torch.bmm(grad_output[rows].transpose(1, 2), activations[rows]).flatten(1)
        norm_sq[rows] = squared_norms(grads)
    return norm_sq


def linear_clipped_grad(
    activations: torch.Tensor, grad_output: torch.Tensor, clip_factor: torch.Tensor
) -> torch.Tensor:
    """See the contract."""
    factor, operands = kept_samples(clip_factor, activations, grad_output)
    activations, grad_output = widened(*operands)
    factor = factor.to(grad_output.dtype)[:, None, None]
    if grad_output.shape[2] <= activations.shape[2]:
        grad_output = grad_output * factor
    else:
        activations = activations * factor
    if _positions_first(activations) and _positions_first(grad_output):
        activations, grad_output = activations.transpose(0, 1), grad_output.transpose(0, 1)
    return grad_output.flatten(0, 1).T @ activations.flatten(0, 1)


def _positions_first(operand: torch.Tensor) -> bool:
    """Whether [B, T, F] lies in memory as [T, B, F], as recurrent layers leave it."""
    return operand.transpose(0, 1).is_contiguous()
