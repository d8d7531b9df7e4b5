"""Clip factors and the fused end of a DP step in Triton, against the reference."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from dpkernels import ops
from dpkernels.ops.clip import clip_factor, finish_grad_, weighted_sum_
from tests.ops.triton_device import DTYPES, MARKS, load, on_device

clip = load("dpkernels.ops.clip.triton")

pytestmark = MARKS


@pytest.fixture(autouse=True)
def few_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs for a handful of elements."""
    monkeypatch.setattr(clip, "LANES", 8)
    monkeypatch.setattr(clip, "FACTOR_BLOCK", 16)


@pytest.mark.parametrize("gamma", [0.0, 0.01])
@pytest.mark.parametrize("bound", [1.5, 0.1, 1e-30])
def test_clip_factor(bound: float, gamma: float) -> None:
    norms = [0.0, 1e-18, 0.3, 1.0, 1.5, 1.5000001, 2.0, 777.0, 1e18]
    special = [math.nan, math.inf, -math.inf, -1e-9, -0.0]
    (norm_sq,) = on_device(torch.tensor([norm * norm for norm in norms] * 2 + special))
    with ops.use_backend("reference"):
        expected = clip_factor(norm_sq, bound, gamma)
    with ops.use_backend("triton"):
        factor = clip_factor(norm_sq, bound, gamma)
        assert clip_factor(norm_sq[:0], bound, gamma).shape == (0,)
    torch.testing.assert_close(factor, expected, rtol=2e-7, atol=0)


def test_factor_times_norm_never_exceeds_the_bound() -> None:
    generator = torch.Generator().manual_seed(5)
    (norm_sq,) = on_device(torch.rand(256, generator=generator) * 4 + 1e-3)
    for bound in (1.0, 0.1, 1 / 3, 1.7):
        with ops.use_backend("triton"):
            factor = clip_factor(norm_sq, bound)
        norm = norm_sq.double().sqrt().float()
        assert (factor * norm <= bound).all()
        for f, n in zip(factor.tolist(), norm.tolist(), strict=True):
            assert Fraction(f) * Fraction(n) <= Fraction(bound)


def draw(
    shape: tuple[int, ...], batch: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    out = torch.randn(shape, generator=generator).to(dtypes[0])
    samples = torch.randn((batch, *shape), generator=generator).to(dtypes[1])
    return out, samples, torch.rand(batch, generator=generator)


@pytest.mark.parametrize(
    ("dtypes", "batch", "accumulate", "noise_std"),
    [
        ((torch.float32, torch.float32), 3, True, 0.7),
        ((torch.float32, torch.float32), 6, False, 0.0),
        ((torch.float32, torch.bfloat16), 3, False, 0.7),
        ((torch.float32, torch.float32), 0, False, 0.7),
        ((torch.float32, torch.float32), 0, True, 0.0),
        ((torch.bfloat16, torch.float32), 2, True, 0.7),
        ((torch.float16, torch.float16), 2, True, 0.0),
    ],
)
@pytest.mark.parametrize("shape", [(1,), (7, 11)])
def test_finish(
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    batch: int,
    accumulate: bool,
    noise_std: float,
    key: torch.Tensor,
) -> None:
    out, samples, factor = draw(shape, batch, dtypes)
    if not accumulate:
        out.fill_(torch.nan)
    rest = (noise_std, 0.25, key, 2**32 - 2, accumulate)
    with ops.use_backend("reference"):
        exact = finish_grad_(out.double(), samples.double(), factor.double(), *rest)
    out, samples, factor = on_device(out, samples, factor)
    with ops.use_backend("triton"):
        assert finish_grad_(out, samples, factor, *rest) is out
    unit = torch.finfo(dtypes[0]).eps
    torch.testing.assert_close(out.cpu().double(), exact, rtol=2 * unit, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weighted_sum_skips_what_has_no_weight(dtype: torch.dtype) -> None:
    out, samples, factor = draw((5, 9), 5, (torch.float32, dtype))
    factor[2] = 0
    exact = out.double() + torch.einsum("b,bij->ij", factor.double(), samples.double())
    samples[2] = torch.nan
    out, samples, factor = on_device(out, samples, factor)
    with ops.use_backend("triton"):
        weighted_sum_(out, samples, factor)
    torch.testing.assert_close(out.cpu().double(), exact, rtol=1e-6, atol=1e-6)


def test_strides_change_nothing(key: torch.Tensor) -> None:
    out, samples, factor = on_device(*draw((6, 8), 3, (torch.float32, torch.float32)))
    turned = out.T.contiguous().T
    wide = torch.stack((samples, samples), dim=-1)[..., 0]
    rest = (0.5, 1.0, key, 3, True)
    with ops.use_backend("triton"):
        finish_grad_(out, samples, factor, *rest)
        finish_grad_(turned, wide, factor, *rest)
    assert torch.equal(out, turned)


def test_same_bits_twice(key: torch.Tensor) -> None:
    out, samples, factor = on_device(*draw((70,), 3, (torch.float32, torch.float32)))
    twin = out.clone()
    with ops.use_backend("triton"):
        finish_grad_(out, samples, factor, 0.5, 1.0, key, 3, True)
        finish_grad_(twin, samples, factor, 0.5, 1.0, key, 3, True)
    assert torch.equal(out, twin)
