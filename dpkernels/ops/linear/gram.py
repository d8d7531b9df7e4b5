"""The Gram form of a linear layer's norm: what it costs on the backend that forms it.

norm_sq = sum_{t,s} <A_t, A_s><G_t, G_s> (docs/math.md section 2). Every backend forms the tiles on
and above the diagonal: the larger they are, the more of what lies below is formed with them.
"""

from __future__ import annotations

import torch

from dpkernels.ops.checks import result_dtype
from dpkernels.ops.linear import linear_norm_sq

LIBRARY_TILE = 256
_TILES = {"cpu": 16, "triton": 64}


def gram_flops(activations: torch.Tensor, grad_output: torch.Tensor) -> float:
    """Floating-point operations of all samples' Gram norms.

    Args:
        activations: [B, T, I].
        grad_output: [B, T, O].
    """
    samples, positions, features_in = activations.shape
    backend = linear_norm_sq.backend(activations, grad_output)
    own = backend != "cpu" or is_compiled(result_dtype(activations, grad_output))
    tile = min(positions, _TILES.get(backend, LIBRARY_TILE) if own else LIBRARY_TILE)
    tiles = -(-positions // tile) if positions else 0
    return samples * tiles * (tiles + 1.0) * tile**2 * (features_in + grad_output.shape[2])


def is_cheaper(activations: torch.Tensor, grad_output: torch.Tensor) -> bool:
    """Whether half of both Grams takes fewer operations than the gradient."""
    _, positions, features_in = activations.shape
    features_out = grad_output.shape[2]
    return positions * (features_in + features_out) < 2 * features_in * features_out


def is_compiled(dtype: torch.dtype) -> bool:
    """Whether csrc/cpu/linear.cpp takes operands that are widened to `dtype`."""
    return dtype == torch.float32
