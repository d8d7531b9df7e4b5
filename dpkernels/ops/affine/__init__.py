"""Per-sample gradients of scales and shifts: biases and the affine part of normalisation layers.

Two layouts: `[B, C, T]`, channels before positions (convolution, group and instance norm), and
`[B, T, C]`, channels last (Linear bias, layer and RMS norm, whose ops say `last`). These gradients
are small ([B, C]); norms and clipped sums of them are plain reductions.
"""

from __future__ import annotations

import torch

from dpkernels.ops.checks import check_clipped, require_float, require_shape, result_dtype
from dpkernels.ops.registry import contract


def _check_pair(value: torch.Tensor, grad_output: torch.Tensor, name: str = "normalized") -> None:
    require_float(name, value, 3)
    require_float("grad_output", grad_output, 3)
    require_shape("grad_output", grad_output, list(value.shape))


def _check_statistics(mean: torch.Tensor, rstd: torch.Tensor) -> None:
    require_float("mean", mean, 2)
    require_float("rstd", rstd, 2)
    require_shape("rstd", rstd, list(mean.shape))


def _check_bias(grad_output: torch.Tensor) -> None:
    require_float("grad_output", grad_output, 3)


def _check_normalization(
    input: torch.Tensor, grad_output: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> None:
    _check_pair(input, grad_output, "input")
    _check_statistics(mean, rstd)
    batch, channels, _ = input.shape
    groups = mean.shape[1]
    if mean.shape[0] != batch or groups < 1 or channels % groups:
        raise ValueError(
            f"mean: shape {list(mean.shape)}, expected [{batch}, a divisor of {channels}]"
        )


def _check_normalization_last(
    input: torch.Tensor, grad_output: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> None:
    _check_pair(input, grad_output, "input")
    _check_statistics(mean, rstd)
    require_shape("mean", mean, list(input.shape[:2]))


def _check_groups(input: torch.Tensor, groups: int, eps: float) -> None:
    require_float("input", input, 3)
    if groups < 1 or input.shape[1] % groups:
        raise ValueError(f"groups={groups}: expected a divisor of {input.shape[1]} channels")
    if not eps >= 0:
        raise ValueError(f"eps={eps}: expected a number >= 0")


@contract(check=_check_pair)
def affine_grad_sample(normalized: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """Per-sample gradient of a channel's scale, sum_t G * xhat.

    Args:
        normalized: [B, C, T], what the scale multiplies.
        grad_output: [B, C, T].

    Returns:
        [B, C], float32 (float64 if an input is).
    """
    dtype = result_dtype(normalized, grad_output)
    return grad_output.new_empty(grad_output.shape[:2], dtype=dtype)


def _transposed(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """[B, T, C] -> [B, C, T]."""
    require_float(name, tensor, 3)
    return tensor.transpose(1, 2)


@contract(runs=affine_grad_sample)
def affine_last_grad_sample(
    normalized: torch.Tensor, grad_output: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """As :func:`affine_grad_sample` for [B, T, C] operands; returns [B, C].

    Shapes that do not fit each other are named as [B, C, T].
    """
    return _transposed("normalized", normalized), _transposed("grad_output", grad_output)


@contract(check=_check_bias)
def bias_grad_sample(grad_output: torch.Tensor) -> torch.Tensor:
    """Per-sample gradient of a channel's shift, sum_t G: [B, C, T] -> [B, C]."""
    return grad_output.new_empty(grad_output.shape[:2], dtype=result_dtype(grad_output))


@contract(runs=bias_grad_sample)
def bias_last_grad_sample(grad_output: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As :func:`bias_grad_sample` for channels last: [B, T, C] -> [B, C]."""
    return (_transposed("grad_output", grad_output),)


@contract(check=_check_normalization)
def normalization_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """Group norm's per-sample weight and bias gradients in one pass, xhat never formed.

    Instance norm has one group per channel; mean 0 and rstd 1 give a plain scale and shift.

    Args:
        input: [B, C, T], the layer's input before normalisation.
        grad_output: [B, C, T], the gradient at the layer's output.
        mean: [B, groups], mean of a group's channels and positions.
        rstd: [B, groups], 1 / sqrt(variance + eps).

    Returns:
        [2, B, C]: weight gradients sum_t G * (x - mean) * rstd, then bias gradients sum_t G;
        float32 (float64 if input or grad_output is).
    """
    dtype = result_dtype(input, grad_output)
    return grad_output.new_empty((2, *grad_output.shape[:2]), dtype=dtype)


@contract(check=_check_normalization_last)
def normalization_last_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """Layer norm's per-sample weight and bias gradients in one pass (RMS norm: mean zeros).

    Args:
        input: [B, T, D], normalised over D at every position.
        grad_output: [B, T, D].
        mean: [B, T].
        rstd: [B, T].

    Returns:
        [2, B, D]: weight gradients sum_t G * (x - mean_t) * rstd_t, then bias gradients sum_t G;
        float32 (float64 if input or grad_output is).
    """
    dtype = result_dtype(input, grad_output)
    shape = (2, grad_output.shape[0], grad_output.shape[2])
    return grad_output.new_empty(shape, dtype=dtype)


@contract(check=_check_groups)
def normalization_statistics(input: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """Mean and 1 / sqrt(variance + eps) of each sample's channel groups, in one pass.

    For a layer whose forward pass does not hand them out; the variance is the biased one. Layer
    norm over [B, T, D]: pass [B * T, 1, D] and one group.

    Args:
        input: [B, C, T].
        groups: a divisor of C; C for instance norm.
        eps: what the layer adds to the variance.

    Returns:
        [2, B, groups]: means, then reciprocal standard deviations, float32 (float64 for float64).
    """
    return input.new_empty((2, input.shape[0], groups), dtype=result_dtype(input))


@contract(check=_check_pair)
def affine_norm_sq(normalized: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """Squared norm [B] of :func:`affine_grad_sample`."""
    dtype = result_dtype(normalized, grad_output)
    return grad_output.new_empty(grad_output.shape[:1], dtype=dtype)


@contract(check=check_clipped(_check_pair))
def affine_clipped_grad(
    normalized: torch.Tensor, grad_output: torch.Tensor, clip_factor: torch.Tensor
) -> torch.Tensor:
    """Sum over samples of clip_factor[b] times :func:`affine_grad_sample`: [C].

    A sample whose factor is 0 is left out, even where its values are not finite.
    """
    dtype = result_dtype(normalized, grad_output)
    return grad_output.new_empty(grad_output.shape[1:2], dtype=dtype)
