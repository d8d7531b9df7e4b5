"""The small-channel convolution kernel: its code on the host, and what it is not for.

csrc/common/small_conv.h is all of the CUDA kernel but its matrix instructions; here a C++ compiler
builds it with loops in their place (tests/ops/small_conv_emulation.cpp).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest
import torch

from dpkernels import ops
from dpkernels.ops import native
from dpkernels.ops.conv import cuda
from dpkernels.ops.conv.geometry import Geometry, native_geometry
from dpkernels.ops.registry import use_backend
from tests.ops.compare import tf32

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = Path(__file__).with_name("small_conv_emulation.cpp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One convolution: [batch, channels] and the sizes per spatial axis."""

    batch: int
    channels: tuple[int, int]
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    slots: int = 1
    missing: int = 0
    """Windows per axis that grad_output does not have."""

    @property
    def geometry(self) -> Geometry:
        weight_shape = (self.channels[1], self.channels[0], *self.kernel)
        return Geometry(weight_shape, self.stride, self.padding, (1,) * len(self.size), 1)

    @property
    def output(self) -> tuple[int, ...]:
        return tuple(windows - self.missing for windows in self.geometry.windows(self.size))


CASES = {
    "3d": Case(2, (5, 7), (6, 5, 19), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    "3d, all channels, slots": Case(1, (32, 32), (9, 6, 33), (3, 3, 3), (1, 1, 1), (1, 1, 1), 3),
    "3d, stride 2": Case(2, (3, 20), (9, 8, 35), (3, 3, 3), (2, 2, 2), (1, 1, 1), 2),
    "3d, mixed axes": Case(1, (17, 16), (4, 7, 20), (1, 2, 3), (1, 2, 1), (0, 1, 2)),
    "3d, one voxel": Case(3, (1, 1), (1, 1, 1), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    "3d, wide padding": Case(1, (2, 3), (2, 3, 4), (3, 2, 2), (2, 1, 2), (3, 2, 3)),
    "3d, windows left out": Case(1, (4, 9), (8, 7, 21), (3, 3, 3), (2, 1, 2), (1, 0, 1), 1, 1),
    "2d": Case(2, (16, 33 - 1), (21, 17), (3, 3), (1, 1), (1, 1), 2),
    "2d, stride 2, no padding": Case(1, (8, 8), (23, 40), (3, 3), (2, 2), (0, 0)),
    "1d": Case(2, (24, 9), (301,), (3,), (1,), (1,), 2),
    "1d, stride 2": Case(1, (1, 2), (3,), (2,), (2,), (0,)),
}

Form = Callable[[torch.Tensor, torch.Tensor, Case], torch.Tensor | None]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Form:
    """The kernel on the host: per-sample gradients, or None where it has no plan."""
    library = tmp_path_factory.mktemp("emulation") / "small_conv.so"
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    try:
        command = [*compiler.split(), *flags, *includes, str(SOURCE), "-o", str(library)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip(f"no C++ compiler: {compiler}")
    assert built.returncode == 0, built.stderr
    function = ctypes.CDLL(str(library)).small_conv

    def run(input: torch.Tensor, grad_output: torch.Tensor, case: Case) -> torch.Tensor | None:
        geometry = case.geometry
        members = native_geometry(input, grad_output, geometry)
        numbers = [*members[:4], *chain(*members[4:])]
        partials = torch.empty(len(input), case.slots, *geometry.weight_shape)
        failed = function(
            ctypes.c_void_p(input.data_ptr()),
            ctypes.c_void_p(grad_output.data_ptr()),
            native.dtype_code(input.dtype),
            ctypes.c_void_p(partials.data_ptr()),
            (ctypes.c_int64 * len(numbers))(*numbers),
            case.slots,
        )
        return None if failed else partials.sum(1)

    return run


def operands(
    case: Case, dtype: torch.dtype, channels_last: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((case.batch, c, *s) for c, s in zip(case.channels, (case.size, case.output)))
    input, grad_output = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    if channels_last:
        input, grad_output = (
            t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (input, grad_output)
        )
    return input, grad_output


def rounded_to_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Ten bits of mantissa, ties away from zero."""
    bits = tensor.view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def truth(
    input: torch.Tensor, grad_output: torch.Tensor, case: Case
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients in float64 of the values that are multiplied, and the size of what is added up."""
    if input.dtype == torch.float32:
        input, grad_output = rounded_to_tf32(input), rounded_to_tf32(grad_output)
    wide = input.double(), grad_output.double()
    with use_backend("reference"):
        exact = ops.conv_grad_sample(*wide, *case.geometry)
        magnitude = ops.conv_grad_sample(*(w.abs() for w in wide), *case.geometry)
    return exact, magnitude


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(
    name: str, dtype: torch.dtype, channels_last: bool, emulated: Form
) -> None:
    """Products of 16-bit and TF32 numbers are exact in float32; only the sums round."""
    case = CASES[name]
    input, grad_output = operands(case, dtype, channels_last)
    grads = emulated(input, grad_output, case)
    exact, magnitude = truth(input, grad_output, case)
    positions = torch.Size(case.output).numel()
    assert grads is not None
    assert grads.shape == exact.shape
    assert ((grads.double() - exact).abs() <= 2.0**-24 * (positions / 8 + 4) * magnitude).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_no_window_reaches_does_not_count(dtype: torch.dtype, emulated: Form) -> None:
    case = CASES["3d, windows left out"]
    input, grad_output = operands(case, dtype)
    clean = emulated(input, grad_output, case)
    spoilt = input.clone()
    spoilt[..., -1] = spoilt[:, :, -1] = torch.nan
    assert torch.equal(emulated(spoilt, grad_output, case), clean)


def test_a_bad_sample_stays_alone(emulated: Form) -> None:
    case = CASES["3d, stride 2"]
    input, grad_output = operands(case, torch.bfloat16)
    clean = emulated(input, grad_output, case)
    input[0, 0] = torch.nan
    grads = emulated(input, grad_output, case)
    assert torch.equal(grads[1], clean[1])
    assert grads[0, :, 0].isnan().any()


def test_strided_operands(emulated: Form) -> None:
    """Every second channel of a larger tensor, cropped: neither contiguous nor aligned."""
    case = CASES["3d"]
    input, grad_output = operands(case, torch.float16)
    sliced = []
    for tensor in (input, grad_output):
        batch, channels, *size = tensor.shape
        larger = torch.full((batch, 2 * channels, *(n + 3 for n in size)), torch.nan).half()
        view = larger[:, ::2, 1 : 1 + size[0], 2 : 2 + size[1], 3 : 3 + size[2]]
        sliced.append(view.copy_(tensor))
    assert torch.equal(emulated(*sliced, case), emulated(input, grad_output, case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_there_is_a_plan_for_all_that_the_backend_takes(
    axes: int, stride: int, dtype: torch.dtype, emulated: Form
) -> None:
    """The largest kernels, strides and channels fit into shared memory."""
    case = Case(1, (32, 32), (6,) * axes, (3,) * axes, (stride,) * axes, (1,) * axes)
    input, grad_output = operands(case, dtype)
    with tf32(True):
        assert cuda.why_not_conv_grad_sample(input, grad_output, case.geometry) is None
    assert emulated(input, grad_output, case) is not None


GOOD = {
    "input": torch.zeros(2, 4, 5, 5, dtype=torch.bfloat16),
    "grad_output": torch.zeros(2, 6, 5, 5, dtype=torch.bfloat16),
    "weight_shape": [6, 4, 3, 3],
    "stride": [1, 1],
    "padding": [1, 1],
    "dilation": [1, 1],
    "groups": 1,
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"input": GOOD["input"].float(), "grad_output": GOOD["grad_output"].float()}, "TF32"),
        ({"input": GOOD["input"].half()}, "one dtype"),
        ({"input": GOOD["input"].double(), "grad_output": GOOD["grad_output"].double()}, "float64"),
        ({"weight_shape": [33, 4, 3, 3]}, "channels"),
        ({"input": torch.zeros(2, 33, 5, 5, dtype=torch.bfloat16)}, "channels"),
        ({"groups": 2}, "in 2"),
        ({"weight_shape": [6, 4, 1, 1]}, "several taps"),
        ({"weight_shape": [6, 4, 3, 5]}, "up to 3 wide"),
        ({"stride": [1, 3]}, "strides up to 2"),
        ({"dilation": [2, 1]}, "no dilation"),
    ],
)
def test_what_it_is_not_for(change: dict[str, object], reason: str | None) -> None:
    with tf32(False):
        input, grad_output, *geometry = (GOOD | change).values()
        found = cuda.why_not_conv_grad_sample(input, grad_output, Geometry.of(*geometry))
    assert (found is None) if reason is None else (reason in found)


def test_slots_depend_on_the_image_alone() -> None:
    assert [cuda.slots_of(n) for n in (1, 1023, 2048, 5000, 10**6)] == [1, 1, 2, 4, 64]


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_on_the_device(
    name: str, dtype: torch.dtype, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same cases in slots and in parts of the batch; the same bits twice."""
    case = CASES[name]
    input, grad_output = operands(case, dtype, channels_last)
    exact, magnitude = truth(input, grad_output, case)
    monkeypatch.setattr(cuda, "SLOT_POSITIONS", 64)
    monkeypatch.setattr(cuda, "SCRATCH_ELEMENTS", 1)
    with tf32(True), use_backend("cuda"):
        moved = input.cuda(), grad_output.cuda()
        grads = ops.conv_grad_sample(*moved, *case.geometry)
        assert torch.equal(ops.conv_grad_sample(*moved, *case.geometry), grads)
    positions = torch.Size(case.output).numel()
    error = (grads.cpu().double() - exact).abs()
    assert (error <= 2.0**-23 * (positions / 8 + 4) * magnitude).all()
