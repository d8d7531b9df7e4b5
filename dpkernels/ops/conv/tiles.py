"""Per-sample convolution gradients by our own kernel, csrc/cpu/conv.cpp.

It packs a block of all channels once and keeps tiles of dot products over positions in registers:
no layout conversion, no unfold, any stride, padding, dilation, groups and memory format.
"""

from __future__ import annotations

import torch

from dpkernels.ops import native, pages
from dpkernels.ops.conv.geometry import Geometry, native_geometry

CHANNEL_BLOCK = 16
"""The library works on blocks of 16 channels: what is not a multiple is slow there, or padded."""

TILE_COLUMNS = 6
"""Weights of an output channel that a tile holds (csrc/cpu/conv_tile.h)."""

LONGEST_ROW = 8192
"""The kernel packs whole rows of all channels: longer ones would need too much scratch."""

POSITIONS_BELOW_BLOCK = 64
POSITIONS_OFF_BLOCK = 216
POSITIONS_AGAINST_LOOP = 256
POSITIONS_AT_BLOCK = {1: 512, 2: 1024, 3: 32768}


def is_faster(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry, folds_well: bool
) -> bool:
    """Whether the kernel beats the library's per-sample calls here.

    The rule is read off measurements (one thread, AVX-512; `python -m bench ops`): a tile pays for
    its horizontal sums with positions. With fewer channels than the library's block it is up to
    ten times as fast; at multiples of the block it wins at full resolution, where the library's
    layout conversion weighs, and where the library has to run sample by sample.

    Args:
        input, grad_output, geometry: as for :func:`grad_sample`.
        folds_well: whether the library can take the batch in one call.
    """
    if input.dtype != torch.float32 or native.why_not_cpu() is not None:
        return False
    if native.extension(input).instruction_set == "baseline":
        return False
    if grad_output.shape[-1] > LONGEST_ROW:
        return False
    positions = grad_output.shape[2:].numel()
    if min(geometry.channels) < CHANNEL_BLOCK:
        return positions >= POSITIONS_BELOW_BLOCK
    if any(channels % CHANNEL_BLOCK for channels in geometry.channels):
        return positions >= POSITIONS_OFF_BLOCK
    if not folds_well:
        return positions >= POSITIONS_AGAINST_LOOP
    return positions >= POSITIONS_AT_BLOCK[geometry.axes] and set(geometry.stride) == {1}


def spare_a_copy(geometry: Geometry) -> bool:
    """Whether a kernel of one tap strides, so that a matrix product would copy its input first."""
    return set(geometry.stride) != {1} and geometry.channels[0] >= TILE_COLUMNS


def grad_sample(input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Per-sample gradients [B, *weight_shape]; float32 operands of any strides."""
    result = pages.new_empty(input, (input.shape[0], *geometry.weight_shape))
    native.extension(input).conv_grad_sample(
        input.data_ptr(),
        grad_output.data_ptr(),
        result.data_ptr(),
        native_geometry(input, grad_output, geometry),
        native.launch_on(input),
    )
    return result
