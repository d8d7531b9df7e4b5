"""Linear layers on the CPU: library products, and our own symmetric Gram."""

from __future__ import annotations

import torch

from dpkernels.ops import native
from dpkernels.ops.linear import gram, library
from dpkernels.ops.linear.library import linear_clipped_grad, linear_grad_sample

__all__ = ["linear_clipped_grad", "linear_grad_sample", "linear_norm_sq", "unavailable"]

unavailable = native.why_not_cpu


def linear_norm_sq(activations: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    activations, grad_output = library.widened(activations, grad_output)
    compiled = activations.shape[1] > 1 and gram.is_compiled(activations.dtype)
    if compiled and gram.is_cheaper(activations, grad_output):
        return gram_norm_sq(activations, grad_output)
    return library.linear_norm_sq(activations, grad_output)


def gram_norm_sq(activations: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """The Gram form by csrc/cpu/linear.cpp, which forms half of both Grams and stores neither.

    Args:
        activations: [B, T, I], float32.
        grad_output: [B, T, O], float32.

    Returns:
        [B].
    """
    activations = native.features_adjacent(activations)
    grad_output = native.features_adjacent(grad_output)
    batch, positions, _ = activations.shape
    norm_sq = activations.new_empty(batch)
    native.extension(activations).gram_norm_sq(
        norm_sq.data_ptr(),
        (activations.data_ptr(), *activations.stride()[:2], activations.shape[2]),
        (grad_output.data_ptr(), *grad_output.stride()[:2], grad_output.shape[2]),
        batch,
        positions,
        native.launch_on(activations),
    )
    return norm_sq
