"""Clip factors and the end of a DP step (docs/math.md section 1).

    out = scale * (sum_b clip_factor[b] * grad_sample[b] + noise_std * z)

is one pass over memory; the noise is that of ``dpkernels.ops.noise``.
"""

from __future__ import annotations

import math
from collections.abc import Sized

import torch

from dpkernels.ops.checks import FLOAT_DTYPES, require_clip_factor
from dpkernels.ops.clip.records import NOTHING_MORE, Finish, Places, Sums
from dpkernels.ops.noise import check_noise
from dpkernels.ops.registry import contract

__all__ = ["clip_factor", "finish_grad_", "finish_grads_", "weighted_sum_"]


def _check_clip_factor(norm_sq: torch.Tensor, max_grad_norm: float, gamma: float = 0.0) -> None:
    if norm_sq.ndim != 1 or norm_sq.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"norm_sq: {norm_sq.dtype} {list(norm_sq.shape)}, expected float32 or float64 [B]"
        )
    if not (math.isfinite(max_grad_norm) and max_grad_norm > 0):
        raise ValueError(f"max_grad_norm={max_grad_norm}: expected a finite number > 0")
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma={gamma}: expected a finite number >= 0")


def _check_sum(out: torch.Tensor, grad_sample: torch.Tensor, clip_factor: torch.Tensor) -> None:
    for name, tensor in (("out", out), ("grad_sample", grad_sample)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name}: dtype {tensor.dtype}, expected one of {FLOAT_DTYPES}")
    if grad_sample.ndim == 0 or grad_sample.shape[1:] != out.shape:
        raise ValueError(
            f"grad_sample: shape {list(grad_sample.shape)}, expected [B, *{list(out.shape)}]"
        )
    require_clip_factor(clip_factor, grad_sample.shape[0])
    for name, tensor in (("grad_sample", grad_sample), ("clip_factor", clip_factor)):
        if tensor.device != out.device:
            raise ValueError(
                f"{name} is on {tensor.device}, out on {out.device}: expected one device"
            )


def _check_finish(sums: Sums, finish: Finish, places: Places) -> None:
    outs = sums.outs
    lists: tuple[Sized, ...] = (*sums, *places)
    lengths = [len(each) for each in lists]
    if lengths.count(len(outs)) != len(lengths):
        names = zip((*Sums._fields, *Places._fields), lengths, strict=True)
        name, length = next((name, n) for name, n in names if n != len(outs))
        raise ValueError(f"{name}: {length} entries, expected one for each of {len(outs)}")
    for out, grad_sample, clip_factor in zip(*sums, strict=True):
        if out.device != outs[0].device:
            raise ValueError(
                f"outs are on {[str(out.device) for out in outs]}: expected one device"
            )
        _check_sum(out, grad_sample, clip_factor)
    check_noise(finish.noise_std, finish.key, min(places.blocks, default=0))
    if not math.isfinite(finish.scale):
        raise ValueError(f"scale={finish.scale}: expected a finite number")


@contract(check=_check_clip_factor)
def clip_factor(norm_sq: torch.Tensor, max_grad_norm: float, gamma: float = 0.0) -> torch.Tensor:
    """The weight of each sample in the clipped sum.

    ``min(1, C / norm)`` where `gamma` is 0 (flat clipping), ``C / (norm + gamma)`` otherwise
    (automatic clipping, Bu et al. 2023). A sample whose norm is not finite gets 0.

    Args:
        norm_sq: [B] float32/float64, squared norms; what rounding made negative counts as 0.
        max_grad_norm: C, > 0.
        gamma: stability constant of automatic clipping, >= 0.

    Returns:
        [B], dtype of `norm_sq`.

    Guarantees:
        ``factor * norm <= C`` with norm the correctly rounded root of `norm_sq` and the product in
        exact or in the result's arithmetic: ratios are shrunk by two units of rounding.
    """
    return torch.empty_like(norm_sq)


@contract(check=_check_finish, mutates=("outs",))
def finish_grads_(sums: Sums, finish: Finish, places: Places) -> list[torch.Tensor]:
    """:func:`finish_grad_` of all parameters of a model in one call, and on a GPU few launches.

    Args:
        outs: any shapes and dtypes, on one device, none a part of another; what they held is
            ignored unless `accumulate`.
        grad_samples: for each [B, *out.shape]; B may be 0 and need not be the same for all.
        clip_factors: for each [B] float32/float64, often one and the same tensor.
        noise_std: standard deviation of the noise before scaling; 0 draws nothing.
        scale: factor on everything.
        key: [4] int64 on the CPU.
        blocks: for each the first block counter: noise and sums are the bits of
            :func:`finish_grad_` with this block.
        accumulate: for each whether to add to what it holds.

    Returns:
        `outs`.
    """
    return sums.outs


@contract(mutates=("out",), runs=finish_grads_)
def finish_grad_(
    out: torch.Tensor,
    grad_sample: torch.Tensor,
    clip_factor: torch.Tensor,
    noise_std: float,
    scale: float,
    key: torch.Tensor,
    block: int,
    accumulate: bool,
) -> tuple[Sums, Finish, Places]:
    """Clip, sum, add noise and scale, in place, in one pass over memory.

    ``out = scale * ((out if accumulate else 0) + sum_b clip_factor[b] * grad_sample[b]
    + noise_std * z)``, summed in float64 where `out` is float64 and in float32 otherwise.

    Args:
        out: any shape, float16/bfloat16/float32/float64; what it held is ignored (not even read)
            unless `accumulate`.
        grad_sample: [B, *out.shape], any of these dtypes; B may be 0 (an empty Poisson batch).
        clip_factor: [B] float32/float64. Samples with factor 0 are not read: 0 * NaN is 0 here.
        noise_std: standard deviation of the noise before scaling; 0 draws nothing.
        scale: factor on everything, 1 / expected batch size for a mean.
        key: [4] int64 on the CPU, as in ``gaussian_noise_``.
        block: first block counter; ``blocks_needed(out.numel())`` are used.
        accumulate: add to what `out` holds.

    Returns:
        `out`.
    """
    sums = Sums([out], [grad_sample], [clip_factor])
    return sums, Finish(noise_std, scale, key), Places([block], [accumulate])


@contract(mutates=("out",), runs=finish_grads_)
def weighted_sum_(
    out: torch.Tensor, grad_sample: torch.Tensor, clip_factor: torch.Tensor
) -> tuple[Sums, Finish, Places]:
    """``out += sum_b clip_factor[b] * grad_sample[b]``, in place, in at least float32.

    Args:
        out: any shape, float16/bfloat16/float32/float64.
        grad_sample: [B, *out.shape], any of these dtypes; B may be 0.
        clip_factor: [B] float32/float64. Samples with factor 0 are not read: 0 * NaN is 0 here.

    Returns:
        `out`.
    """
    return Sums([out], [grad_sample], [clip_factor]), NOTHING_MORE, Places([0], [True])
