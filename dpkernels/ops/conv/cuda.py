"""Convolutions with few channels on CUDA devices: csrc/cuda/small_conv.cu.

With up to 32 channels on both sides a weight gradient has few numbers and long sums. The kernel
keeps all of them in registers, reads each tile of the image once for all taps, and multiplies on
matrix units. Everything else is for other backends.
"""

from __future__ import annotations

import torch

from dpkernels.ops import native
from dpkernels.ops.conv.geometry import Geometry, native_geometry
from dpkernels.ops.precision import float32_products

unavailable = native.why_not_cuda

MOST_CHANNELS = 32
MOST_SLOTS = 64
SLOT_POSITIONS = 1024
"""A sample's positions are spread over slots, MOST_SLOTS or so many positions each: a function of
the image's size alone, so that the same inputs give the same bits."""
SCRATCH_ELEMENTS = 1 << 24
"""Of the slots' sums; a larger batch is taken in parts."""


def why_not_conv_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> str | None:
    """Why this convolution is not for the kernel."""
    channels, groups = max(input.shape[1], geometry.weight_shape[0]), geometry.groups
    taps = torch.Size(geometry.kernel).numel()
    if input.dtype != grad_output.dtype or input.dtype == torch.float64:
        return f"it takes operands of one dtype below float64, not {input.dtype} and " + str(
            grad_output.dtype
        )
    if input.dtype == torch.float32 and float32_products("cuda", "conv") == "ieee":
        return "its float32 products are TF32, which torch.backends.cudnn does not allow"
    if groups != 1 or channels > MOST_CHANNELS:
        return f"it takes up to {MOST_CHANNELS} channels in one group, not {channels} in {groups}"
    widest, farthest = max(geometry.kernel), max(geometry.stride)
    if taps == 1 or widest > 3 or farthest > 2 or max(geometry.dilation) > 1:
        return "it takes kernels of several taps up to 3 wide, strides up to 2 and no dilation"
    if input.is_cuda and torch.cuda.get_device_capability(input.device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


def conv_grad_sample(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """See the contract."""
    result = torch.empty(
        (input.shape[0], *geometry.weight_shape), dtype=torch.float32, device=input.device
    )
    if input.numel() == 0 or grad_output.numel() == 0:
        return result.zero_()
    slots = slots_of(grad_output.shape[2:].numel())
    part = max(1, SCRATCH_ELEMENTS // (slots * geometry.weights)) if slots > 1 else len(input)
    scratch = (min(part, len(input)), slots, geometry.weights) if slots > 1 else (0,)
    partials = torch.empty(scratch, dtype=torch.float32, device=input.device)
    operands = (input.detach().split(part), grad_output.detach().split(part), result.split(part))
    for seen, grads, out in zip(*operands, strict=True):
        native.extension(seen).small_conv_grad_sample(
            seen.data_ptr(),
            grads.data_ptr(),
            native.dtype_code(seen.dtype),
            partials.data_ptr(),
            out.data_ptr(),
            native_geometry(seen, grads, geometry),
            slots,
            native.launch_on(seen),
        )
    return result


def slots_of(positions: int) -> int:
    """Over how many sums one sample's positions are spread."""
    return min(MOST_SLOTS, max(1, positions // SLOT_POSITIONS))
