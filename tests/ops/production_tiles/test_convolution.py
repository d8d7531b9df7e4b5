"""Convolutions: gradients, norms and clipped sums, in whole tiles; few channels in CUDA."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

from dpkernels import ops
from dpkernels.ops.conv import cuda as small_conv
from tests.ops import test_conv, test_small_conv
from tests.ops.compare import tf32
from tests.ops.production_tiles.support import (
    BF16,
    FP16,
    FP32,
    Truth,
    cases,
    check,
    check_one_gradient,
    clipped_of,
    factor_of,
    moved,
    norm_sq_of,
    on_cuda,
    on_triton,
)
from tests.ops.shapes import Conv
from tests.ops.triton_device import DEVICE, load, on_device

conv = load("dpkernels.ops.conv.triton")


@dataclass(frozen=True)
class Convolution:
    """A convolution, its operands' dtype and memory layout, and whether TF32 is allowed."""

    conv: Conv
    dtype: torch.dtype
    layout: str = "contiguous"
    tf32: bool = True

    @property
    def rounded(self) -> bool:
        return self.tf32 and self.dtype == FP32


def _conv(
    channels: tuple[int, int],
    size: tuple[int, ...],
    kernel: int = 3,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> Conv:
    axes = len(size)
    every = ((n,) * axes for n in (kernel, stride, padding, dilation))
    return Conv(2, *channels, size, *every, groups)


_VOLUMES, _FEW = _conv((16, 136), (3, 4, 5)), _conv((16, 72), (3, 4, 5))
_IMAGES, _SMALL = _conv((16, 136), (9, 8)), _conv((16, 72), (9, 8))
CONV = {
    "conv3d, bf16": Convolution(_VOLUMES, BF16),
    "conv3d, bf16, channels last": Convolution(_VOLUMES, BF16, "channels last"),
    "conv3d, bf16, several slots": Convolution(_conv((2, 24), (10, 11, 10)), BF16),
    "conv3d, fp16": Convolution(_VOLUMES, FP16),
    "conv3d, fp32, IEEE": Convolution(_FEW, FP32, tf32=False),
    "conv3d, fp32, TF32, channels last": Convolution(_FEW, FP32, "channels last"),
    "conv2d, bf16": Convolution(_IMAGES, BF16),
    "conv2d, bf16, channels last": Convolution(_IMAGES, BF16, "channels last"),
    "conv2d, fp32, IEEE": Convolution(_SMALL, FP32, tf32=False),
    "conv2d, fp32, TF32": Convolution(_SMALL, FP32),
}
OTHER_CONV = {
    "conv3d, bf16, stride 2, channels last": Convolution(
        _conv((16, 136), (5, 8, 7), stride=2), BF16, "channels last"
    ),
    "conv2d, bf16, one tap": Convolution(_conv((80, 136), (9, 8), 1, padding=0), BF16),
    "conv2d, bf16, one tap, stride 2, channels last": Convolution(
        _conv((80, 136), (13, 12), 1, 2, 0), BF16, "channels last"
    ),
    "conv2d, bf16, patches": Convolution(_conv((3, 136), (80, 112), 16, 16, 0), BF16),
    "conv2d, bf16, dilated": Convolution(_conv((16, 136), (11, 11), 3, 1, 2, 2), BF16),
    "conv2d, bf16, depthwise": Convolution(_conv((16, 16), (9, 8), groups=16), BF16),
    "conv2d, fp16, groups, channels last": Convolution(
        _conv((32, 272), (9, 8), groups=2), FP16, "channels last"
    ),
    "conv1d, bf16": Convolution(_conv((48, 136), (80,)), BF16),
}
GRAM_CONV = [name for name in CONV if name.startswith("conv2d")] + [
    "conv2d, fp16, groups, channels last",
    "conv3d, bf16, stride 2, channels last",
]


@functools.cache
def conv_case(case: Convolution) -> tuple[tuple[torch.Tensor, torch.Tensor], Truth]:
    """The operands on the CPU, and the truth."""
    input, grads = test_conv.operands(case.conv, case.dtype, case.layout)
    return (input, grads), test_conv.Truth(input.float(), grads.float(), case.conv).grads()


def _conv_forms() -> list[tuple[str, str]]:
    stored = [(name, form) for name in CONV for form in ("gradient", "tile-discard norm")]
    fused = ("gradient and norm", "clipped sum")
    every = [(name, form) for name in CONV | OTHER_CONV for form in fused]
    return stored + every + [(name, "channel Gram norm") for name in GRAM_CONV]


@pytest.mark.parametrize(("name", "form"), cases(_conv_forms()))
@on_triton
def test_convolution(backend: str, name: str, form: str) -> None:
    case = (CONV | OTHER_CONV)[name]
    operands, truth = conv_case(case)
    geometry = case.conv.geometry
    factor = factor_of(case.conv.batch)
    *moved, weight = on_device(*operands, factor)
    with tf32(case.tf32):
        if form == "gradient":
            check(conv.conv_grad_sample(*moved, geometry), truth, case.rounded)
        elif form == "gradient and norm":
            grads, norm_sq = conv.grad_sample_and_norm_sq(*moved, geometry)
            check(grads, truth, case.rounded)
            check(norm_sq, norm_sq_of(truth), case.rounded)
        elif form == "tile-discard norm":
            norm_sq = conv.recompute_norm_sq(*moved, geometry)
            check(norm_sq, norm_sq_of(truth), case.rounded)
        elif form == "channel Gram norm":
            norm_sq = conv.channel_gram_norm_sq(*moved, geometry)
            check(norm_sq, norm_sq_of(truth), case.rounded)
        else:
            total = conv.conv_clipped_grad(*moved, weight, geometry)
            check(total, clipped_of(truth, factor), case.rounded)


@pytest.mark.parametrize(
    "name", ["conv3d, bf16, several slots", "conv2d, bf16", "conv2d, fp32, TF32"]
)
@on_triton
def test_convolution_norms_and_sum_are_those_of_the_stored_gradient(
    backend: str, name: str
) -> None:
    case = CONV[name]
    operands, truth = conv_case(case)
    geometry = case.conv.geometry
    moved = on_device(*operands)
    one = torch.ones(1, device=DEVICE)
    with tf32(case.tf32):
        grads, norm_sq = conv.grad_sample_and_norm_sq(*moved, geometry)
        forms = {
            "stored": lambda: norm_sq,
            "discarded": lambda: conv.recompute_norm_sq(*moved, geometry),
        }
        if name in GRAM_CONV:
            forms["Gram"] = lambda: conv.channel_gram_norm_sq(*moved, geometry)
        clipped = conv.conv_clipped_grad(*(each[:1] for each in moved), one, geometry)
        check_one_gradient(forms, grads, clipped, truth, case.rounded)


_SmallConv = test_small_conv.Case
SMALL_CONV = {
    "conv3d": _SmallConv(2, (32, 32), (13, 14, 15), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    "conv3d, stride 2": _SmallConv(2, (32, 32), (25, 26, 27), (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    "conv2d": _SmallConv(2, (32, 32), (47, 53), (3, 3), (1, 1), (1, 1)),
    "conv2d, stride 2": _SmallConv(2, (32, 32), (95, 89), (3, 3), (2, 2), (1, 1)),
    "conv3d, 4 to 32 channels": _SmallConv(2, (4, 32), (13, 14, 15), (3, 3, 3), (1,) * 3, (1,) * 3),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("name", SMALL_CONV)
@on_cuda
def test_convolution_of_few_channels(
    backend: str, name: str, dtype: torch.dtype, channels_last: bool
) -> None:
    case = SMALL_CONV[name]
    positions = torch.Size(case.output).numel()
    assert small_conv.slots_of(positions) > 1
    assert positions % small_conv.SLOT_POSITIONS
    input, grads = test_small_conv.operands(case, dtype, channels_last)
    exact, magnitude = test_small_conv.truth(input, grads, case)
    with tf32(True), ops.use_backend(backend):
        actual = ops.conv_grad_sample(*moved(backend, input, grads), *case.geometry).cpu()
    error = (actual.double() - exact).abs()
    assert (error <= 2.0**-23 * (positions / 8 + 4) * magnitude).all()
