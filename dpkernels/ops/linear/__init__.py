"""Linear layers: per-sample norms and gradients of a weight [O, I] used at T positions.

Symbols as in docs/math.md section 2: activations A [T, I] and gradient at the output G [T, O] of
one sample; its weight gradient is G^T A. A layer without a sequence axis has T = 1. A module that
is called several times in one forward concatenates its calls along T, which gives the norm of the
sum (not the sum of the norms).
"""

from __future__ import annotations

import torch

from dpkernels.ops.checks import check_clipped, require_float, require_shape, result_dtype
from dpkernels.ops.registry import contract


def _check(activations: torch.Tensor, grad_output: torch.Tensor) -> None:
    require_float("activations", activations, 3)
    require_float("grad_output", grad_output, 3)
    batch, positions, _ = activations.shape
    require_shape("grad_output", grad_output, [batch, positions, grad_output.shape[2]])


@contract(check=_check)
def linear_norm_sq(activations: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """Squared norm of each sample's weight gradient, without keeping the gradients.

    Args:
        activations: [B, T, I], float16/bfloat16/float32/float64, any strides.
        grad_output: [B, T, O], the gradient at the layer's output.

    Returns:
        [B], |sum_t G_t (x) A_t|^2, float32 (float64 if an input is), never negative.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    return grad_output.new_empty(
        (activations.shape[0],), dtype=result_dtype(activations, grad_output)
    )


@contract(check=_check)
def linear_grad_sample(activations: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """Per-sample weight gradients G_b^T A_b.

    Args:
        activations: [B, T, I].
        grad_output: [B, T, O].

    Returns:
        [B, O, I], float32 (float64 if an input is).
    """
    batch, _, features_in = activations.shape
    return grad_output.new_empty(
        (batch, grad_output.shape[2], features_in), dtype=result_dtype(activations, grad_output)
    )


@contract(check=check_clipped(_check))
def linear_clipped_grad(
    activations: torch.Tensor, grad_output: torch.Tensor, clip_factor: torch.Tensor
) -> torch.Tensor:
    """Sum of clipped weight gradients, sum_b f_b G_b^T A_b, as one matrix product.

    Args:
        activations: [B, T, I].
        grad_output: [B, T, O].
        clip_factor: [B], float32 or float64. A sample whose factor is 0 is left out, even where
            its values are not finite.

    Returns:
        [O, I], float32 (float64 if an input is).
    """
    return grad_output.new_empty(
        (grad_output.shape[2], activations.shape[2]), dtype=result_dtype(activations, grad_output)
    )
