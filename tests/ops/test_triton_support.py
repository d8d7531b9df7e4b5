"""What the Triton kernels share: fixed split factors, ordered sums, and reasons."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from dpkernels import ops
from dpkernels.ops.conv.geometry import Geometry
from tests.ops import shapes
from tests.ops.compare import tf32
from tests.ops.triton_device import MARKS, load, on_device

support = load("dpkernels.ops.triton_support")

pytestmark = MARKS


@pytest.mark.parametrize("positions", [0, 1, 1023, 1024, 1025, 40_000, 2_097_152])
@pytest.mark.parametrize("weights", [1, 1 << 12, 27_648, 1 << 20, 1 << 21])
def test_chunks_cover_every_position_once(positions: int, weights: int) -> None:
    slots, chunk = support.split_factor(positions, weights)
    assert slots >= 1
    assert slots * chunk >= positions
    assert (slots - 1) * chunk < max(positions, 1)
    assert slots <= next((n for most, n in support.SPLITS if weights <= most), 1)


@pytest.mark.parametrize("size", [1, 5, 40])
def test_combine(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "COMBINE_BLOCK", 16)
    generator = torch.Generator().manual_seed(2)
    (partials,) = on_device(torch.randn(2, 3, size, generator=generator))
    sums, squares = support.combine(partials, store=True, square=True)
    exact = partials.double().sum(1)
    torch.testing.assert_close(sums.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(squares.double(), exact.square().sum(1), rtol=1e-6, atol=0)


def test_sums_are_never_negative_and_keep_nan() -> None:
    rows = torch.tensor([[1.0, -3.0], [torch.nan, 1.0], [0.5, 0.25]])
    sums = support.sum_rows(*on_device(rows)).cpu()
    assert sums[0] == 0
    assert sums[1].isnan()
    assert sums[2] == 0.75
    assert support.sum_rows(*on_device(torch.empty(0, 3))).shape == (0,)
    assert support.sum_rows(*on_device(torch.empty(2, 0))).tolist() == [0, 0]


def test_double_precision_is_refused_by_name() -> None:
    operands = on_device(torch.ones(1, 2, 3).double(), torch.ones(1, 2, 3).double())
    with ops.use_backend("triton"), pytest.raises(ops.BackendUnavailable, match="float64"):
        ops.linear_norm_sq(*operands)


def test_library_registration(key: torch.Tensor) -> None:
    """A pure op on strided operands and one that mutates, as torch.compile would see them."""
    (operand,) = on_device(shapes.LAYOUTS["sliced"](torch.ones(2, 3, 4)))
    out, samples, factor = on_device(torch.ones(3, 4), torch.ones(2, 3, 4), torch.ones(2))
    finish = (out, samples, factor, 1.0, 0.5, key, 3, True)
    with ops.use_backend("triton"):
        torch.library.opcheck(torch.ops.dpkernels.linear_norm_sq.default, (operand, operand))
        torch.library.opcheck(torch.ops.dpkernels.finish_grad_.default, finish)


def test_a_sample_beyond_32_bit_offsets_is_refused() -> None:
    (tensor,) = on_device(torch.zeros(1))
    far = torch.as_strided(tensor, (1, 1), (1, 1)).expand(2, 2**31 + 1)
    assert support.span(far) == 0
    assert support.why_not(far) is None
    meta = torch.empty(1, 2, 2**30 + 1, device="meta")
    assert support.span(meta) > support.INDEX_LIMIT


def test_cpu_tensors_without_the_interpreter_are_refused_with_the_remedy() -> None:
    """In a process of its own: Triton reads the variable once."""
    program = (
        "import torch\nfrom dpkernels import ops\nx = torch.ones(1, 2, 3)\n"
        "with ops.use_backend('triton'):\n    ops.linear_norm_sq(x, x)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "BackendUnavailable" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


def launches(monkeypatch: pytest.MonkeyPatch, module: ModuleType, kernel: str) -> list[dict]:
    """What the module's kernel is launched with by name, from now on; nothing is computed."""
    found: list[dict] = []

    class Noted:
        def __getitem__(self, grid: object):
            return lambda *_, **options: found.append(options)

    monkeypatch.setattr(module, kernel, Noted())
    return found


@pytest.mark.parametrize("allowed", [False, True])
def test_kernels_multiply_float32_as_the_switches_of_tf32_allow(
    monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    """The interpreter multiplies both alike, so what the kernels are told is looked at."""
    linear, conv = load("dpkernels.ops.linear.triton"), load("dpkernels.ops.conv.triton")
    gram = load("dpkernels.ops.conv.triton_gram")
    noted = [
        launches(monkeypatch, module, kernel)
        for module, kernel in (
            (linear, "linear_gram_kernel"),
            (linear, "linear_gradient_kernel"),
            (linear, "linear_rows_kernel"),
            (conv, "conv_gradient_kernel"),
            (gram, "conv_channel_gram_kernel"),
            (gram, "conv_box_norm_kernel"),
        )
    ]
    a, g = on_device(torch.ones(2, 40, 5), torch.ones(2, 40, 4))
    x, y = on_device(torch.ones(2, 3, 6, 6), torch.ones(2, 4, 6, 6))
    geometry = Geometry((4, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    with tf32(allowed):
        linear.gram_norm_sq(a, g)
        linear.grad_sample_and_norm_sq(a, g)
        linear.linear_clipped_grad(a[:, :1], g[:, :1], *on_device(torch.ones(2)))
        conv.grad_sample_and_norm_sq(x, y, geometry)
        conv.channel_gram_norm_sq(x, y, geometry)
    for found in noted:
        assert found
        assert {options["PRECISION"] for options in found} == {"tf32" if allowed else "ieee"}
