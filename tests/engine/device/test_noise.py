"""Noise on a device: the CPU's key stream bit by bit, and normals with the stated moments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dpkernels import ops
from dpkernels.ops.noise import chacha20_blocks_, gaussian_noise_
from tests.engine.device.models import network_of
from tests.engine.device.support import backward, private
from tests.engine.truth import relative_error


@pytest.mark.parametrize("block", [0, 2**32 - 7, 2**63 - 2**17])
@pytest.mark.parametrize("blocks", [1, 70_001])
def test_key_stream(blocks: int, block: int, device: torch.device, key: torch.Tensor) -> None:
    """The reference has it from RFC 8439's vectors; 70,001 blocks take many thread blocks."""
    words = torch.zeros((blocks, 16), dtype=torch.int32, device=device)
    chacha20_blocks_(words, key, block, 3)
    expected = torch.zeros((blocks, 16), dtype=torch.int32)
    with ops.use_backend("reference"):
        chacha20_blocks_(expected, key, block, 3)
    assert torch.equal(words.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_normals_are_the_references(
    dtype: torch.dtype, device: torch.device, key: torch.Tensor
) -> None:
    shape = (301, 67)
    drawn = gaussian_noise_(torch.zeros(shape, dtype=dtype, device=device), 0.7, key, 12345)
    with ops.use_backend("reference"):
        expected = gaussian_noise_(torch.zeros(shape, dtype=torch.float64), 0.7, key, 12345)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float64: 1e-12}[dtype]
    assert relative_error(drawn.cpu(), expected) < tolerance


def assert_normal(z: torch.Tensor) -> None:
    """Moments, correlation of neighbours and the whole distribution, within six deviations."""
    z = z.double().cpu().flatten()
    n = len(z)
    assert abs(float(z.mean())) < 6 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 6 * math.sqrt(2 / n)
    assert abs(float(z.pow(3).mean())) < 6 * math.sqrt(15 / n)
    assert abs(float(z.pow(4).mean()) - 3) < 6 * math.sqrt(96 / n)
    for lag in (1, 2, 4, 8):
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 6 / math.sqrt(n - lag)
    ordered = z.sort().values
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distribution = torch.special.ndtr(ordered)
    gap = torch.maximum(distribution - steps[:-1], steps[1:] - distribution).max()
    assert float(gap) < 3 / math.sqrt(n), "the chance of that gap is below 1e-7"


def test_a_million_normals(device: torch.device, key: torch.Tensor) -> None:
    assert_normal(gaussian_noise_(torch.zeros(1_000_003, device=device), 1.0, key, 0))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_noise_of_steps(dtype: torch.dtype | None, device: torch.device) -> None:
    """What steps add to the clipped sum: sigma C / B times normals, none of them twice."""
    model, x = network_of("rows", 8, device)
    model = nn.Sequential(nn.Linear(40, 500), nn.Tanh(), nn.Linear(500, 64))
    quiet = private(model, x, device, 0.5)
    backward(quiet, x, dtype)
    noisy = private(model, x, device, 0.5, noise=3.0)
    drawn = []
    for _ in range(2):
        noisy.optimizer.zero_grad()
        backward(noisy, x, dtype)
        for p, q in zip(noisy.model.parameters(), quiet.model.parameters(), strict=True):
            drawn.append((p.grad - q.grad).double().flatten() * 8 / (3.0 * 0.5))
    assert_normal(torch.cat(drawn))
    first, second = torch.cat(drawn[:4]), torch.cat(drawn[4:])
    assert abs(float((first * second).mean())) < 6 / math.sqrt(len(first))
