"""Triton kernels of convolutions against one sample at a time, most of them in several tiles."""

from __future__ import annotations

import math

import pytest
import torch

from dpkernels import ops
from dpkernels.ops.conv.geometry import Geometry
from tests.ops import shapes
from tests.ops.compare import assert_as_exact_as_torch
from tests.ops.test_conv import Truth, operands
from tests.ops.triton_device import DTYPES, MARKS, load, on_device

conv = load("dpkernels.ops.conv.triton")
triton_gram = load("dpkernels.ops.conv.triton_gram")
triton_support = load("dpkernels.ops.triton_support")

pytestmark = MARKS

TINY = {
    "3d, tiny": shapes.Conv(2, 2, 3, (3, 4, 2), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    "3d, depthwise": shapes.Conv(2, 2, 2, (3, 3, 3), (2, 3, 2), (1, 2, 1), (1, 1, 0), (1, 1, 1), 2),
}
SHAPES = {
    name: case
    for name, case in (shapes.CONV | TINY).items()
    if math.prod(case.size) <= 200 and case.groups <= 2
}
IMAGES = [n for n, case in SHAPES.items() if case.batch and math.prod(case.size) <= 49]
SEVERAL_TILES = ["1d, strided and dilated", "2d, mixed axes", "3d, tiny"]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    small = triton_support.Tile(16, 16, 16, 4, 2)
    monkeypatch.setattr(conv, "GRADIENT", {2: small, 4: small})
    monkeypatch.setattr(triton_gram, "TILE", 16)
    monkeypatch.setattr(triton_gram, "DEPTH", 16)
    monkeypatch.setattr(triton_support, "CHUNK_POSITIONS", 16)


def check(case: shapes.Conv, input: torch.Tensor, grad_output: torch.Tensor) -> None:
    """All three ops against the truth."""
    truth = Truth(input, grad_output, case)
    factor = torch.linspace(0.2, 1.0, case.batch, dtype=torch.float32)
    input, grad_output, weight = on_device(input, grad_output, factor)
    with ops.use_backend("triton"):
        grads = ops.conv_grad_sample(input, grad_output, *case.geometry)
        norm_sq = ops.conv_norm_sq(input, grad_output, *case.geometry)
        clipped = ops.conv_clipped_grad(input, grad_output, weight, *case.geometry)
    assert grads.is_contiguous()
    assert_as_exact_as_torch(grads.cpu(), *truth.grads())
    assert_as_exact_as_torch(norm_sq.cpu(), *truth.norm_sq())
    assert_as_exact_as_torch(clipped.cpu(), *truth.clipped(factor))


@pytest.mark.parametrize("name", SHAPES)
def test_equals_one_sample_at_a_time(name: str) -> None:
    check(SHAPES[name], *operands(SHAPES[name], torch.float32))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["1d, one position", "2d, stride 2, remainder", "3d, tiny"])
def test_16_bit_operands(name: str, dtype: torch.dtype) -> None:
    check(SHAPES[name], *operands(SHAPES[name], dtype))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", SEVERAL_TILES)
def test_several_tiles_and_slots(name: str) -> None:
    check(SHAPES[name], *operands(SHAPES[name], torch.float32))


@pytest.mark.parametrize("form", ["channel_gram_norm_sq", "recompute_norm_sq"])
@pytest.mark.parametrize("name", IMAGES)
def test_every_norm_strategy(name: str, form: str) -> None:
    case = SHAPES[name]
    input, grad_output = operands(case, torch.float32)
    truth = Truth(input, grad_output, case).norm_sq()
    norm_sq = getattr(conv, form)(*on_device(input, grad_output), case.geometry)
    assert_as_exact_as_torch(norm_sq.cpu(), *truth)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channel_gram_in_several_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with scratch for one sample at a time."""
    monkeypatch.setattr(triton_gram, "SCRATCH_ELEMENTS", 1)
    case = shapes.Conv(2, 4, 18, (5, 4), (3, 2), (1, 1), (1, 0), (1, 1), 2)
    input, grad_output = operands(case, dtype)
    truth = Truth(input, grad_output, case).norm_sq()
    norm_sq = conv.channel_gram_norm_sq(*on_device(input, grad_output), case.geometry)
    assert_as_exact_as_torch(norm_sq.cpu(), *truth)


@pytest.mark.parametrize("layout", [name for name in shapes.LAYOUTS if name != "contiguous"])
def test_any_memory_layout(layout: str) -> None:
    case = SHAPES["3d, tiny"]
    input, grad_output = operands(case, torch.float32, layout)
    check(case, input, grad_output)
    truth = Truth(input, grad_output, case).norm_sq()
    norm_sq = conv.channel_gram_norm_sq(*on_device(input, grad_output), case.geometry)
    assert_as_exact_as_torch(norm_sq.cpu(), *truth)


def test_operands_of_two_dtypes() -> None:
    case = SHAPES["2d, stride 2, remainder"]
    input, grad_output = operands(case, torch.float16)
    truth = Truth(input.float(), grad_output.float(), case)
    moved = on_device(input, grad_output.float())
    with ops.use_backend("triton"):
        grads = ops.conv_grad_sample(*moved, *case.geometry)
    assert_as_exact_as_torch(grads.cpu(), *truth.grads())


def test_a_bad_sample_stays_alone() -> None:
    case = SHAPES["2d, stride 2, remainder"]
    input, grad_output = on_device(*operands(case, torch.float32))
    clean = input.clone()
    clean[0] = 0
    input[0, 0, 0, 0] = torch.nan
    factor = torch.tensor([0.0, 0.5], device=input.device)
    with ops.use_backend("triton"):
        rest = ops.conv_clipped_grad(input, grad_output, factor, *case.geometry)
        alone = ops.conv_clipped_grad(clean, grad_output, factor, *case.geometry)
    assert torch.equal(rest, alone)
    for form in (conv.channel_gram_norm_sq, conv.recompute_norm_sq):
        norm_sq = form(input, grad_output, case.geometry)
        assert norm_sq[0].isnan()
        assert norm_sq[1].isfinite()


@pytest.mark.usefixtures("small_tiles")
def test_same_bits_twice_and_the_sum_adds_what_the_norm_saw() -> None:
    case = SHAPES["3d, tiny"]
    moved = on_device(*operands(case, torch.bfloat16))
    one = moved[0][:1], moved[1][:1]
    grads, norm_sq = conv.grad_sample_and_norm_sq(*moved, case.geometry)
    again, norm_again = conv.grad_sample_and_norm_sq(*moved, case.geometry)
    assert torch.equal(grads, again)
    assert torch.equal(norm_sq, norm_again)
    assert torch.equal(norm_sq, conv.recompute_norm_sq(*moved, case.geometry))
    factor = torch.ones(1, device=grads.device)
    assert torch.equal(conv.conv_clipped_grad(*one, factor, case.geometry), grads[0])


@pytest.mark.parametrize(
    ("size", "channels", "gram"), [((7, 7), 512, True), ((64, 64, 64), 32, False)]
)
def test_small_images_take_the_gram(size: tuple[int, ...], channels: int, gram: bool) -> None:
    axes = len(size)
    ones = (1,) * axes
    geometry = Geometry((channels, channels, *(3,) * axes), ones, ones, ones, 1)
    shape = torch.Size((2, channels, *size))
    assert triton_gram.is_cheaper(shape, shape, geometry) is gram


def test_mutation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that is off by one percent fails the comparison that guards the suite."""
    honest = conv.conv_norm_sq
    monkeypatch.setattr(conv, "conv_norm_sq", lambda *args: honest(*args) * 1.01)
    with pytest.raises(pytest.fail.Exception, match="elements pass"):
        test_equals_one_sample_at_a_time("1d, one position")
