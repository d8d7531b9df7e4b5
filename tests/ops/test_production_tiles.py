"""Every kernel in the tiles, dtypes and layouts in which a GPU runs it, against float64 on the CPU.

Sizes lie just above one tile along every axis that is tiled, so each launch has several programs,
ragged edges and masks. Nothing is replaced by something smaller, unlike in the other tests of the
Triton kernels. Without a CUDA device the Triton kernels run under Triton's interpreter, where TF32
and bfloat16 products are those of float32; the CUDA extension's kernels then do not run.

Products of 16-bit numbers are exact in float32: such results may be off by float32 sums alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from dpkernels import ops
from dpkernels.ops.conv import cuda as small_conv
from dpkernels.ops.conv.geometry import Geometry
from dpkernels.ops.noise import (
    blocks_needed,
    chacha20_blocks_,
    standard_normals,
)
from tests.ops import test_conv, test_embedding, test_small_conv
from tests.ops.compare import ROUNDINGS, assert_as_exact_as_torch, tf32
from tests.ops.shapes import LAYOUTS, Conv
from tests.ops.test_linear import truths
from tests.ops.triton_device import DEVICE, MARKS, load, on_device

linear = load("dpkernels.ops.linear.triton")
conv = load("dpkernels.ops.conv.triton")
affine = load("dpkernels.ops.affine.triton")
embedding = load("dpkernels.ops.embedding.triton")
support = load("dpkernels.ops.triton_support")

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TF32 = 2.0**-9 / (ROUNDINGS * torch.finfo(FP32).eps)
"""How much larger than float32's the error of a TF32 product may be.

Each of two operands is off by 2^-11 of itself where the matrix unit's operands are rounded, and by
up to 2^-10 where their last 13 bits are cut off.
"""

Truth = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Gradients in float32 by PyTorch, in float64, and of absolute values in float64."""

on_triton = pytest.mark.parametrize("backend", [pytest.param("triton", marks=MARKS)])
on_cuda = pytest.mark.parametrize("backend", [pytest.param("cuda", marks=pytest.mark.gpu)])
on_both = pytest.mark.parametrize(
    "backend",
    [pytest.param("triton", marks=MARKS), pytest.param("cuda", marks=pytest.mark.gpu)],
)


def cases(pairs: list[tuple[str, str]]) -> list[object]:
    """(name, form) as parameters; what the interpreter would only repeat is left to a device.

    It multiplies float16 and TF32 as it does bfloat16 and float32, and a gradient alone takes the
    path of a gradient and its norm.
    """
    repeats = [
        "fp16" in name or "TF32" in name or (form == "gradient" and name.startswith("conv"))
        for name, form in pairs
    ]
    return [
        pytest.param(*pair, marks=[pytest.mark.gpu] if repeat else [])
        for pair, repeat in zip(pairs, repeats, strict=True)
    ]


def norm_sq_of(truth: Truth) -> Truth:
    """Squared norms per sample; an error d of an element g moves its square by 2 g d."""
    plain, exact, magnitude = (each.flatten(1) for each in truth)
    return (
        plain.square().sum(1),
        exact.square().sum(1),
        2 * (exact.abs() * magnitude).sum(1),
    )


def clipped_of(truth: Truth, factor: torch.Tensor) -> Truth:
    plain, exact, magnitude = (
        torch.einsum("b,b...->...", factor.to(each.dtype), each) for each in truth
    )
    return plain, exact, magnitude


def factor_of(batch: int) -> torch.Tensor:
    """Clip factors [batch], one of them 0 where there are three or more."""
    factor = torch.linspace(0.2, 1.0, batch)
    if batch > 2:
        factor[1] = 0
    return factor


def check(actual: torch.Tensor, truth: Truth, rounded: bool) -> None:
    """Compare; `rounded`: whether the products were TF32."""
    plain, exact, magnitude = truth
    assert_as_exact_as_torch(actual.cpu(), plain, exact, magnitude * (TF32 if rounded else 1))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=FP64)


# Linear layers.


@dataclass(frozen=True)
class Linear:
    """(B, T, I, O), the operands' dtypes and memory layout, and whether TF32 is allowed."""

    shape: tuple[int, int, int, int]
    dtypes: tuple[torch.dtype, torch.dtype]
    layout: str = "contiguous"
    tf32: bool = False

    @property
    def rounded(self) -> bool:
        return self.tf32 and FP32 in self.dtypes


LINEAR = {
    "bf16": Linear((2, 144, 160, 144), (BF16, BF16)),
    "bf16, odd widths": Linear((2, 197, 165, 133), (BF16, BF16)),
    "bf16, positions fastest": Linear((2, 144, 160, 144), (BF16, BF16), "channels last"),
    "bf16, few weights, several slots": Linear((3, 2100, 32, 32), (BF16, BF16)),
    "bf16, less than a tile": Linear((2, 40, 48, 24), (BF16, BF16)),
    "fp16": Linear((2, 144, 160, 144), (FP16, FP16)),
    "fp32, IEEE": Linear((2, 80, 96, 80), (FP32, FP32)),
    "fp32, TF32": Linear((2, 80, 96, 80), (FP32, FP32), tf32=True),
    "bf16 and fp32, IEEE": Linear((2, 80, 96, 80), (BF16, FP32)),
}
GRAM_LINEAR = [name for name, case in LINEAR.items() if case.shape[1] < 1000]
ROWS = {
    "bf16, short rows": Linear((30, 5, 96, 80), (BF16, BF16)),
    "bf16, one position": Linear((80, 1, 96, 80), (BF16, BF16)),
    "bf16, short rows, several slots": Linear((300, 7, 32, 32), (BF16, BF16)),
    "fp16, short rows": Linear((30, 5, 96, 80), (FP16, FP16)),
    "fp32, short rows, IEEE": Linear((30, 5, 96, 80), (FP32, FP32)),
    "fp32, short rows, TF32": Linear((30, 5, 96, 80), (FP32, FP32), tf32=True),
}
OUTER = {
    "bf16": Linear((3, 1, 1100, 1040), (BF16, BF16)),
    "fp32": Linear((3, 1, 1100, 1040), (FP32, FP32)),
}


@functools.cache
def linear_case(case: Linear) -> tuple[tuple[torch.Tensor, torch.Tensor], Truth]:
    """The operands on the CPU, and the truth."""
    batch, positions, inputs, outputs = case.shape
    activations, grads = (
        LAYOUTS[case.layout](drawn(batch, positions, width, seed=width).to(dtype))
        for width, dtype in zip((inputs, outputs), case.dtypes, strict=True)
    )
    return (activations, grads), truths(activations.float(), grads.float())


def _linear_forms() -> list[tuple[str, str]]:
    forms = ("gradient", "gradient and norm", "tile-discard norm", "clipped sum")
    every = [(name, form) for name in LINEAR for form in forms]
    return every + [(name, "Gram norm") for name in GRAM_LINEAR]


@pytest.mark.parametrize(("name", "form"), cases(_linear_forms()))
@on_triton
def test_linear(backend: str, name: str, form: str) -> None:
    case = LINEAR[name]
    operands, truth = linear_case(case)
    factor = factor_of(len(operands[0]))
    *moved, weight = on_device(*operands, factor)
    with tf32(case.tf32):
        if form == "gradient":
            check(linear.linear_grad_sample(*moved), truth, case.rounded)
        elif form == "gradient and norm":
            grads, norm_sq = linear.grad_sample_and_norm_sq(*moved)
            check(grads, truth, case.rounded)
            check(norm_sq, norm_sq_of(truth), case.rounded)
        elif form == "tile-discard norm":
            check(linear.recompute_norm_sq(*moved), norm_sq_of(truth), case.rounded)
        elif form == "Gram norm":
            check(linear.gram_norm_sq(*moved), norm_sq_of(truth), case.rounded)
        else:
            total = linear.linear_clipped_grad(*moved, weight)
            check(total, clipped_of(truth, factor), case.rounded)


@pytest.mark.parametrize("name", ROWS)
@on_triton
def test_linear_clipped_sum_of_short_samples(backend: str, name: str) -> None:
    case = ROWS[name]
    operands, truth = linear_case(case)
    factor = factor_of(len(operands[0]))
    assert case.shape[1] < linear.ROW_FORM_POSITIONS
    with tf32(case.tf32):
        total = linear.linear_clipped_grad(*on_device(*operands, factor))
    check(total, clipped_of(truth, factor), case.rounded)


@pytest.mark.parametrize("name", OUTER)
@on_triton
def test_linear_norm_of_one_position(backend: str, name: str) -> None:
    operands, truth = linear_case(OUTER[name])
    check(linear.linear_norm_sq(*on_device(*operands)), norm_sq_of(truth), rounded=False)


# Convolutions.


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
    geometry = Geometry.of(*case.conv.geometry)
    factor = factor_of(case.conv.batch)
    *moved, weight = on_device(*operands, factor)
    with tf32(case.tf32):
        if form == "gradient":
            check(conv.conv_grad_sample(*moved, *case.conv.geometry), truth, case.rounded)
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
            total = conv.conv_clipped_grad(*moved, weight, *case.conv.geometry)
            check(total, clipped_of(truth, factor), case.rounded)


# What the engine composes: norms of one form, sums of another.


def check_one_gradient(
    forms: dict[str, Callable[[], torch.Tensor]],
    grads: torch.Tensor,
    clipped: torch.Tensor,
    truth: Truth,
    rounded: bool,
) -> None:
    """Every norm is that of the stored gradient, and the sum adds the stored bits."""
    stored = grads.cpu().double().flatten(1).square().sum(1)
    magnitude = norm_sq_of(truth)[2]
    for norm in forms.values():
        check(norm(), (stored.float(), stored, magnitude), rounded)
    assert torch.equal(clipped, grads[0])


@pytest.mark.parametrize("name", ["bf16", "bf16, few weights, several slots", "fp16", "fp32, TF32"])
@on_triton
def test_linear_norms_and_sum_are_those_of_the_stored_gradient(backend: str, name: str) -> None:
    case = LINEAR[name]
    operands, truth = linear_case(case)
    moved = on_device(*operands)
    one = torch.ones(1, device=DEVICE)
    with tf32(case.tf32):
        grads, norm_sq = linear.grad_sample_and_norm_sq(*moved)
        forms = {
            "stored": lambda: norm_sq,
            "discarded": lambda: linear.recompute_norm_sq(*moved),
        }
        if name in GRAM_LINEAR:
            forms["Gram"] = lambda: linear.gram_norm_sq(*moved)
        clipped = linear.linear_clipped_grad(*(each[:1] for each in moved), one)
        check_one_gradient(forms, grads, clipped, truth, case.rounded)


@pytest.mark.parametrize(
    "name", ["conv3d, bf16, several slots", "conv2d, bf16", "conv2d, fp32, TF32"]
)
@on_triton
def test_convolution_norms_and_sum_are_those_of_the_stored_gradient(
    backend: str, name: str
) -> None:
    case = CONV[name]
    operands, truth = conv_case(case)
    geometry = Geometry.of(*case.conv.geometry)
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
        clipped = conv.conv_clipped_grad(*(each[:1] for each in moved), one, *case.conv.geometry)
        check_one_gradient(forms, grads, clipped, truth, case.rounded)


# Scales and shifts.


def _per_channel(dtype: torch.dtype, layout: str = "contiguous") -> tuple[torch.Tensor, ...]:
    """Input and gradient [B, C, T]: T beyond a tile and a slot, or, channels last, C as well."""
    shape = (2, 72, 1100) if layout == "channels last" else (2, 6, 2100)
    input, grads = (LAYOUTS[layout](drawn(*shape, seed=i).to(dtype)) for i in range(2))
    return input, grads


def _statistics(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return drawn(*shape, seed=2).float(), drawn(*shape, seed=3).exp().float()


def _last(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Input and gradient [B, T, C]."""
    input, grads = (each.transpose(1, 2) for each in _per_channel(dtype, "channels last"))
    return input, grads


AFFINE: dict[str, tuple[str, Callable[[], tuple[torch.Tensor, ...]]]] = {
    "group norm, bf16": (
        "normalization_grad_sample",
        lambda: (*_per_channel(BF16), *_statistics(2, 3)),
    ),
    "group norm, bf16, channels last": (
        "normalization_grad_sample",
        lambda: (*_per_channel(BF16, "channels last"), *_statistics(2, 3)),
    ),
    "group norm, fp16": (
        "normalization_grad_sample",
        lambda: (*_per_channel(FP16), *_statistics(2, 3)),
    ),
    "group norm, fp32": (
        "normalization_grad_sample",
        lambda: (*_per_channel(FP32), *_statistics(2, 3)),
    ),
    "layer norm, bf16": (
        "normalization_last_grad_sample",
        lambda: (*_last(BF16), *_statistics(2, 1100)),
    ),
    "layer norm, fp32": (
        "normalization_last_grad_sample",
        lambda: (*_last(FP32), *_statistics(2, 1100)),
    ),
    "scale, bf16": ("affine_grad_sample", lambda: _per_channel(BF16)),
    "scale, bf16, channels last": ("affine_last_grad_sample", lambda: _last(BF16)),
    "scale's norm, bf16": ("affine_norm_sq", lambda: _per_channel(BF16)),
    "scale's clipped sum, bf16": (
        "affine_clipped_grad",
        lambda: (*_per_channel(BF16), factor_of(2)),
    ),
    "bias, bf16": ("bias_grad_sample", lambda: _per_channel(BF16)[1:]),
    "bias, fp32": ("bias_grad_sample", lambda: _per_channel(FP32)[1:]),
    "bias, bf16, channels last": ("bias_last_grad_sample", lambda: _last(BF16)[1:]),
}


@pytest.mark.parametrize("name", AFFINE)
@on_triton
def test_scale_and_shift(backend: str, name: str) -> None:
    op, arguments = AFFINE[name]
    operands = arguments()
    wide = [operand.double() for operand in operands]
    sizes = [operand.abs() for operand in wide]
    if op.startswith("normalization"):
        sizes[2] = -sizes[2]
    versions = [[operand.float() for operand in operands], wide, sizes]
    of = "affine_grad_sample" if op == "affine_norm_sq" else op
    with ops.use_backend("reference"):
        plain, exact, magnitude = (getattr(ops, of)(*version) for version in versions)
    truth = (plain, exact, magnitude)
    actual = getattr(affine, op)(*on_device(*operands))
    check(actual, norm_sq_of(truth) if op == "affine_norm_sq" else truth, rounded=False)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@on_triton
def test_statistics(backend: str, dtype: torch.dtype) -> None:
    input = _per_channel(dtype)[0] + 3
    with ops.use_backend("reference"):
        exact = ops.normalization_statistics(input.double(), 3, 1e-5)
    actual = affine.normalization_statistics(*on_device(input), 3, 1e-5)
    torch.testing.assert_close(actual.cpu().double(), exact, rtol=1e-5, atol=1e-6)


# Embeddings.


@pytest.mark.parametrize("form", ["norm", "gradient", "clipped sum"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@on_triton
def test_embedding_gradients(backend: str, dtype: torch.dtype, form: str) -> None:
    """Runs of equal indices, and rows of the table, longer than what is read at a time."""
    rows, padding = 4, 2
    indices = torch.randint(rows, (3, 43), generator=torch.Generator().manual_seed(1))
    grads = drawn(3, 43, 300).to(dtype)
    factor = factor_of(3)
    truth = test_embedding.truths(indices, grads.float(), rows, padding)
    at, grad_output, weight = on_device(indices, grads, factor)
    if form == "norm":
        norm_sq = embedding.embedding_norm_sq(at, grad_output, padding)
        check(norm_sq, norm_sq_of(truth), rounded=False)
    elif form == "gradient":
        actual = embedding.embedding_grad_sample(at, grad_output, rows, padding)
        check(actual, truth, rounded=False)
    else:
        total = embedding.embedding_clipped_grad(at, grad_output, weight, rows, padding)
        check(total, clipped_of(truth, factor), rounded=False)


# Sums of slots.


@pytest.mark.parametrize(("store", "square"), [(True, False), (False, True), (True, True)], ids=str)
@on_triton
def test_slots_are_added(backend: str, store: bool, square: bool) -> None:
    partials = drawn(3, 5, 2100).float()
    exact, magnitude = partials.double().sum(1), partials.double().abs().sum(1)
    truth = (partials.sum(1), exact, magnitude)
    sums, squares = support.combine(*on_device(partials), store, square)
    assert sums.numel() == (exact.numel() if store else 0)
    if store:
        check(sums, truth, rounded=False)
    if square:
        check(squares, norm_sq_of(truth), rounded=False)


@on_triton
def test_rows_are_summed(backend: str) -> None:
    rows = drawn(3, 2100).float().abs()
    exact = rows.double().sum(1)
    actual = support.sum_rows(*on_device(rows))
    check(actual, (rows.sum(1), exact, exact), rounded=False)


# Clip factors, the end of a step, noise: the Triton and the CUDA kernels.

BLOCK = 2**32 - 150
"""The counter's low word overflows inside a program."""


def moved(backend: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if backend == "triton":
        return on_device(*tensors)
    return tuple(tensor.cuda() for tensor in tensors)


def check_rounded(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """What was computed in float32 or float64 and stored in `actual`'s dtype."""
    unit = torch.finfo(actual.dtype).eps
    absolute = 1e-12 if actual.dtype == FP64 else 3e-6
    torch.testing.assert_close(actual.cpu().double(), exact, rtol=2 * unit, atol=absolute)


@pytest.mark.parametrize("gamma", [0.0, 0.01])
@on_both
def test_clip_factors(backend: str, gamma: float) -> None:
    norm_sq = drawn(300).exp().float()
    norm_sq[257:261] = torch.tensor([0.0, torch.inf, torch.nan, -1e-9])
    with ops.use_backend("reference"):
        expected = ops.clip_factor(norm_sq.double(), 1.0, gamma)
    with ops.use_backend(backend):
        factor = ops.clip_factor(*moved(backend, norm_sq), 1.0, gamma)
    torch.testing.assert_close(factor.cpu().double(), expected, rtol=6e-7, atol=0)
    finite = norm_sq.double().clamp(min=0).nan_to_num(0, 0).sqrt()
    assert (factor.cpu().double() * finite <= 1.0).all()


def finish_operands(
    size: int, out: torch.dtype, samples: torch.dtype, batch: int = 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    factor = factor_of(batch).to(FP64 if out == FP64 else FP32)
    return drawn(size, seed=size).to(out), drawn(batch, size).to(samples), factor


FINISH = {
    "fp32": (FP32, FP32),
    "fp32 of bf16 samples": (FP32, BF16),
    "fp32 of fp16 samples": (FP32, FP16),
    "bf16": (BF16, BF16),
    "bf16 of fp32 samples": (BF16, FP32),
    "fp16": (FP16, FP16),
}


STEPS = {
    "noise added to a sum": (0.7, True),
    "noise": (0.7, False),
    "sum": (0.0, True),
}
SIZES = {"aligned": 2064, "odd": 2051}


def _ends() -> list[tuple[str, str, str]]:
    wide = [("fp32", step, size) for step in STEPS for size in SIZES]
    return wide + [(name, "noise added to a sum", "odd") for name in FINISH if name != "fp32"]


@pytest.mark.parametrize(("name", "step", "size"), _ends())
@on_both
def test_end_of_a_step(backend: str, name: str, step: str, size: str, key: torch.Tensor) -> None:
    noise_std, accumulate = STEPS[step]
    out, samples, factor = finish_operands(SIZES[size], *FINISH[name])
    rest = (noise_std, 0.25, key, BLOCK, accumulate)
    with ops.use_backend("reference"):
        exact = ops.finish_grad_(out.double(), samples.double(), factor.double(), *rest)
    if not accumulate:
        out.fill_(torch.nan)
    out, samples, factor = moved(backend, out, samples, factor)
    with ops.use_backend(backend):
        ops.finish_grad_(out, samples, factor, *rest)
    check_rounded(out, exact)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@on_both
def test_weighted_sum(backend: str, dtype: torch.dtype) -> None:
    out, samples, factor = finish_operands(2051, FP32, dtype)
    exact = out.double() + torch.einsum("b,bi->i", factor.double(), samples.double())
    out, samples, factor = moved(backend, out, samples, factor)
    with ops.use_backend(backend):
        ops.weighted_sum_(out, samples, factor)
    check_rounded(out, exact)


@on_cuda
def test_end_of_a_step_of_all_parameters(backend: str, key: torch.Tensor) -> None:
    """More parameters than one launch's table holds, of every dtype and of many sizes."""
    dtypes = [*FINISH.values(), (FP64, FP64)]
    sizes = [1, 7, 8, 9, 2047, 2048, 2049, 5003, 4112]
    parts = [
        finish_operands(sizes[i % len(sizes)] + 8 * (i // len(sizes)), *dtypes[i % len(dtypes)])
        for i in range(91)
    ]
    blocks, block = [], BLOCK
    for out, _, _ in parts:
        blocks.append(block)
        block += blocks_needed(out.numel())
    accumulate = [i % 3 > 0 for i in range(len(parts))]
    with ops.use_backend("reference"):
        exact = [
            ops.finish_grad_(
                *(each.to(FP64, copy=True) for each in part), 0.7, 0.25, key, first, added
            )
            for part, first, added in zip(parts, blocks, accumulate, strict=True)
        ]
    outs, samples, factors = (
        list(each) for each in zip(*(moved(backend, *part) for part in parts), strict=True)
    )
    with ops.use_backend(backend):
        ops.finish_grads_(outs, samples, factors, 0.7, 0.25, key, blocks, accumulate)
    for out, expected in zip(outs, exact, strict=True):
        check_rounded(out, expected)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@on_both
def test_noise(backend: str, dtype: torch.dtype, key: torch.Tensor) -> None:
    tensor = drawn(2051).to(dtype)
    with ops.use_backend("reference"):
        exact = ops.gaussian_noise_(tensor.double(), 0.7, key, BLOCK)
    (noisy,) = moved(backend, tensor)
    with ops.use_backend(backend):
        ops.gaussian_noise_(noisy, 0.7, key, BLOCK)
    check_rounded(noisy, exact)


@on_both
def test_key_stream(backend: str, key: torch.Tensor) -> None:
    """Bit for bit the words of the CPU, across the counter's carry."""
    with ops.use_backend("reference"):
        expected = chacha20_blocks_(torch.empty(300, 16, dtype=torch.int32), key, BLOCK, 5)
    (words,) = moved(backend, torch.empty(300, 16, dtype=torch.int32))
    with ops.use_backend(backend):
        chacha20_blocks_(words, key, BLOCK, 5)
    assert torch.equal(words.cpu(), expected)


@on_both
def test_normals(backend: str, key: torch.Tensor) -> None:
    with ops.use_backend("reference"):
        words = chacha20_blocks_(torch.empty(300, 16, dtype=torch.int32), key, BLOCK)
        exact = standard_normals(words, FP64)
    with ops.use_backend(backend):
        normals = standard_normals(*moved(backend, words))
    torch.testing.assert_close(normals.cpu().double(), exact, rtol=1e-6, atol=1e-6)


@on_cuda
def test_double_precision(backend: str, key: torch.Tensor) -> None:
    """Normals, noise and clip factors in float64, which Triton does not have."""
    norm_sq, tensor = drawn(300).exp(), drawn(2051)
    with ops.use_backend("reference"):
        words = chacha20_blocks_(torch.empty(300, 16, dtype=torch.int32), key, BLOCK)
        exact = standard_normals(words, FP64)
        noise_exact = ops.gaussian_noise_(tensor.clone(), 0.7, key, BLOCK)
        factor = ops.clip_factor(norm_sq, 1.0)
    words, noisy, norm_sq = moved(backend, words, tensor, norm_sq)
    with ops.use_backend(backend):
        check_rounded(standard_normals(words, FP64), exact)
        check_rounded(ops.gaussian_noise_(noisy, 0.7, key, BLOCK), noise_exact)
        check_rounded(ops.clip_factor(norm_sq, 1.0), factor)


# Convolutions of few channels: the CUDA extension's kernel, 32 x 32 channels, several slots.

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
    geometry = [list(part) for part in vars(case.geometry).values() if isinstance(part, tuple)]
    with tf32(True), ops.use_backend(backend):
        actual = ops.conv_grad_sample(*moved(backend, input, grads), *geometry, 1).cpu()
    error = (actual.double() - exact).abs()
    assert (error <= 2.0**-23 * (positions / 8 + 4) * magnitude).all()
