"""Clip factors and the end of a DP step in Triton: one pass over memory, noise in registers."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from dpkernels.ops import native
from dpkernels.ops import triton_support as support
from dpkernels.ops.clip.records import Finish, Places, Sums
from dpkernels.ops.noise.triton import SECRETS, key_arguments, noise_of

unavailable = support.unavailable

LANES = 128
"""ChaCha20 blocks, of eight elements each, per program."""
FACTOR_BLOCK = 256


@triton.jit
def factor_kernel(
    norm_sq, out, batch, bound_high, bound_low, gamma, AUTOMATIC: tl.constexpr, BLOCK: tl.constexpr
):
    """out[b] = min(1, C / norm) or C / (norm + gamma), in float64, shrunk by two units of float32.

    C = bound_high + bound_low: arguments of kernels are float32.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    square = tl.load(norm_sq + at, mask=at < batch, other=0.0).to(tl.float64)
    bound = tl.zeros([BLOCK], tl.float64) + bound_high + bound_low
    norm = tl.sqrt(tl.where(square < 0, 0.0, square))
    shrink = 1.0 - 2.0**-22
    if AUTOMATIC:
        factor = bound / (norm + gamma) * shrink
    else:
        factor = tl.where(norm <= bound, 1.0, bound / tl.maximum(norm, bound) * shrink)
    finite = norm < float("inf")
    tl.store(out + at, tl.where(finite, factor, 0.0).to(tl.float32), mask=at < batch)


@triton.jit(do_not_specialize=SECRETS)
def finish_kernel(
    out, samples, factor, batch, size, noise_std, scale,
    block_low, block_high, nonce_low, nonce_high,
    key0, key1, key2, key3, key4, key5, key6, key7,
    ACCUMULATE: tl.constexpr, NOISE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """out = scale * (out + sum_b factor[b] * samples[b] + noise_std * z)."""
    first = tl.program_id(0).to(tl.int64) * LANES
    at = first * 8 + tl.arange(0, 8 * LANES)
    inside = at < size
    total = tl.zeros([8 * LANES], tl.float32)
    if ACCUMULATE:
        total += tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    for _ in range(batch):
        weight = tl.zeros([8 * LANES], tl.float32) + tl.load(factor).to(tl.float32)
        value = tl.load(samples + at, mask=inside & (weight != 0.0), other=0.0)
        total += weight * value.to(tl.float32)
        factor += 1
        samples += size
    if NOISE:
        total += noise_std * noise_of(
            first, block_low, block_high, nonce_low, nonce_high,
            key0, key1, key2, key3, key4, key5, key6, key7, LANES,
        )  # fmt: skip
    tl.store(out + at, (scale * total).to(out.dtype.element_ty), mask=inside)


def why_not_clip_factor(norm_sq: torch.Tensor, *rest: object) -> str | None:
    """Why these norms are not for Triton."""
    return support.why_not(norm_sq)


def why_not_finish_grads_(sums: Sums, *rest: object) -> str | None:
    """Why one of these tensors is not for Triton."""
    return support.why_not(*sums.outs, *sums.grad_samples)


def clip_factor(norm_sq: torch.Tensor, max_grad_norm: float, gamma: float = 0.0) -> torch.Tensor:
    """See the contract."""
    squares = norm_sq.detach().contiguous()
    out = torch.empty_like(squares)
    if not len(squares):
        return out
    high, low = _two_floats_below(max_grad_norm)
    with torch.cuda.device_of(squares):
        factor_kernel[(triton.cdiv(len(squares), FACTOR_BLOCK),)](
            squares, out, len(squares), high, low, float(gamma),
            AUTOMATIC=gamma > 0, BLOCK=FACTOR_BLOCK,
        )  # fmt: skip
    return out


def _two_floats_below(value: float) -> tuple[float, float]:
    """Two float32 numbers whose sum is at most `value` and off by less than 2^-46 of it."""
    high = _float32_below(value)
    return high, _float32_below(value - high)


def _float32_below(value: float) -> float:
    """The largest float32 number <= `value` >= 0."""
    single = torch.tensor(value, dtype=torch.float32)
    if float(single) > value:
        single = torch.nextafter(single, torch.tensor(-math.inf))
    return float(single)


def finish_grads_(sums: Sums, finish: Finish, places: Places) -> None:
    """See the contract. One launch for each tensor.

    What is not contiguous is copied: noise follows the flat index.
    """
    noise_std, scale, key = finish
    for out, grad_sample, factor, block, add in zip(*sums, *places, strict=True):
        if out.numel() == 0:
            continue
        flat = out.detach().contiguous()
        with torch.cuda.device_of(flat):
            finish_kernel[(triton.cdiv(flat.numel(), 8 * LANES),)](
                flat, grad_sample.detach().contiguous(), factor.detach().contiguous(),
                len(factor), flat.numel(), float(noise_std), float(scale),
                *key_arguments(key, block),
                ACCUMULATE=add, NOISE=noise_std != 0, LANES=LANES,
            )  # fmt: skip
        native.write_back(out, flat)
