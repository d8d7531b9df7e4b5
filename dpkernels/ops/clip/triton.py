"""Clip factors and the end of a DP step in Triton: one pass over memory, noise in registers."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from dpkernels.ops import native
from dpkernels.ops import triton_support as support
from dpkernels.ops.noise.triton import SECRETS, key_arguments, noise_of
from dpkernels.ops.triton_support import unavailable

__all__ = ["clip_factor", "finish_grad_", "finish_grads_", "unavailable", "weighted_sum_"]

LANES = 128
"""ChaCha20 blocks, of eight elements each, per program."""
FACTOR_BLOCK = 256
_NO_KEY = torch.zeros(4, dtype=torch.int64)


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


def why_not_clip_factor(norm_sq: torch.Tensor, *rest: object, **named: object) -> str | None:
    """Why these norms are not for Triton."""
    return support.why_not(norm_sq)


def why_not_weighted_sum_(
    out: torch.Tensor, grad_sample: torch.Tensor, clip_factor: torch.Tensor
) -> str | None:
    """Why these tensors are not for Triton."""
    return support.why_not(out, grad_sample)


def why_not_finish_grad_(
    out: torch.Tensor, grad_sample: torch.Tensor, *rest: object, **named: object
) -> str | None:
    """Why these tensors are not for Triton."""
    return support.why_not(out, grad_sample)


def why_not_finish_grads_(
    outs: list[torch.Tensor], grad_samples: list[torch.Tensor], *rest: object, **named: object
) -> str | None:
    """Why one of these tensors is not for Triton."""
    return support.why_not(*outs, *grad_samples)


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


def weighted_sum_(
    out: torch.Tensor, grad_sample: torch.Tensor, clip_factor: torch.Tensor
) -> torch.Tensor:
    """See the contract."""
    return finish_grad_(out, grad_sample, clip_factor, 0.0, 1.0, _NO_KEY, 0, True)


def finish_grad_(
    out: torch.Tensor,
    grad_sample: torch.Tensor,
    clip_factor: torch.Tensor,
    noise_std: float,
    scale: float,
    key: torch.Tensor,
    block: int,
    accumulate: bool,
) -> torch.Tensor:
    """See the contract. What is not contiguous is copied: noise follows the flat index."""
    if out.numel() == 0:
        return out
    flat = out.detach().contiguous()
    with torch.cuda.device_of(flat):
        finish_kernel[(triton.cdiv(flat.numel(), 8 * LANES),)](
            flat, grad_sample.detach().contiguous(), clip_factor.detach().contiguous(),
            len(clip_factor), flat.numel(), float(noise_std), float(scale),
            *key_arguments(key, block),
            ACCUMULATE=accumulate, NOISE=noise_std != 0, LANES=LANES,
        )  # fmt: skip
    return native.write_back(out, flat)


def finish_grads_(
    outs: list[torch.Tensor],
    grad_samples: list[torch.Tensor],
    clip_factors: list[torch.Tensor],
    noise_std: float,
    scale: float,
    key: torch.Tensor,
    blocks: list[int],
    accumulate: list[bool],
) -> list[torch.Tensor]:
    """See the contract. One launch for each tensor."""
    for out, samples, factor, block, add in zip(
        outs, grad_samples, clip_factors, blocks, accumulate, strict=True
    ):
        finish_grad_(out, samples, factor, noise_std, scale, key, block, add)
    return outs
