"""Linear layers on the CPU: library products, and our own Gram for short sequences."""

from __future__ import annotations

import torch

from dpkernels.ops import native
from dpkernels.ops.linear import library
from dpkernels.ops.linear.library import linear_clipped_grad, linear_grad_sample

__all__ = ["linear_clipped_grad", "linear_grad_sample", "linear_norm_sq"]

LONGEST_SEQUENCE = 128
"""The most positions with which our Gram was measured to win (bench/NOTES.md)."""


def linear_norm_sq(activations: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """See the contract."""
    activations, grad_output = library.widened(activations, grad_output)
    if _is_short(activations) and library.gram_is_cheaper(activations, grad_output):
        return short_gram_norm_sq(activations, grad_output)
    return library.linear_norm_sq(activations, grad_output)


def short_gram_norm_sq(activations: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """The Gram form by csrc/cpu/linear.cpp, which forms half of both Grams and stores neither.

    Args:
        activations: [B, T, I], float32.
        grad_output: [B, T, O], float32.

    Returns:
        [B].
    """
    activations, grad_output = _rows(activations), _rows(grad_output)
    batch, positions, features_in = activations.shape
    norm_sq = activations.new_empty(batch)
    native.extension(activations).gram_norm_sq(
        norm_sq.data_ptr(),
        activations.data_ptr(),
        activations.stride()[:2],
        features_in,
        grad_output.data_ptr(),
        grad_output.stride()[:2],
        grad_output.shape[2],
        batch,
        positions,
        native.launch_on(activations),
    )
    return norm_sq


def _is_short(activations: torch.Tensor) -> bool:
    """Whether our Gram beats the library's, which adapts to the machine where ours may not."""
    return (
        1 < activations.shape[1] <= LONGEST_SEQUENCE
        and activations.dtype == torch.float32
        and native.why_not_cpu() is None
        and native.extension(activations).instruction_set == "avx512"
    )


def _rows(operand: torch.Tensor) -> torch.Tensor:
    """`operand` with its features side by side."""
    operand = operand.detach()
    return operand if operand.stride(2) == 1 else operand.contiguous()
