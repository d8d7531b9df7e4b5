"""Clip factors, clipped sums and noise, by Triton and by the CUDA extension."""

from __future__ import annotations

import pytest
import torch

from dpkernels import ops
from dpkernels.ops.noise import (
    blocks_needed,
    chacha20_blocks_,
    standard_normals,
)
from tests.ops.production_tiles.support import (
    BF16,
    FP16,
    FP32,
    FP64,
    drawn,
    factor_of,
    moved,
    on_both,
    on_cuda,
)

BLOCK = 2**32 - 150
"""The counter's low word overflows inside a program."""


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
