"""The layers for which the Triton kernels are compiled ahead of time (tests/ops/aot.py)."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path

import torch

from dpkernels import ops
from dpkernels.ops import triton_support
from dpkernels.ops.affine import triton as affine
from dpkernels.ops.clip import triton as clip
from dpkernels.ops.clip.records import NOTHING_MORE, Finish, Places, Sums
from dpkernels.ops.conv import triton as conv
from dpkernels.ops.conv.geometry import Geometry
from dpkernels.ops.embedding import triton as embedding
from dpkernels.ops.embedding.table import Table
from dpkernels.ops.fingerprints import triton as fingerprints
from dpkernels.ops.linear import triton as linear
from dpkernels.ops.noise import triton as noise

_OPS, _TESTS = Path(ops.__file__).parent, Path(__file__).parent
MODULES = sorted(
    ".".join(("dpkernels", "ops", *path.relative_to(_OPS).with_suffix("").parts))
    for path in _OPS.rglob("triton*.py")
)


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _linear(dtype: torch.dtype, positions: int = 2048) -> tuple[torch.Tensor, torch.Tensor]:
    return tensor(8, positions, 1024, dtype=dtype), tensor(8, positions, 4096, dtype=dtype)


_FACTOR = tensor(8, dtype=torch.float32)
_HALF, _FULL = torch.bfloat16, torch.float32
_KEY = torch.tensor([-5, 7, 2**40, -(2**60)])
_PARAMETER = tensor(4096, 1024, dtype=_FULL)
_TOKENS = tensor(8, 2048, dtype=torch.int64)
_SAMPLES = tensor(8, 4096, 1024, dtype=_FULL)

_VOLUME = Geometry((32, 32, 3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1)
_IMAGE = Geometry((512, 512, 3, 3), (1, 1), (1, 1), (1, 1), 1)
_IMAGES = tensor(8, 512, 7, 7), tensor(8, 512, 7, 7)


def _volumes(
    dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (8, 32, 64, 64, 64)
    input, grads = (tensor(*shape, dtype=dtype).to(memory_format=layout) for _ in range(2))
    return input, grads


CASES: dict[str, Callable[[], object]] = {
    "linear gram, bf16": functools.partial(linear.gram_norm_sq, *_linear(_HALF)),
    "linear gram, fp32": functools.partial(linear.gram_norm_sq, *_linear(_FULL)),
    "linear tile-discard norm, bf16": functools.partial(linear.recompute_norm_sq, *_linear(_HALF)),
    "linear tile-discard norm, fp32": functools.partial(linear.recompute_norm_sq, *_linear(_FULL)),
    "linear gradient and norm, bf16": functools.partial(
        linear.grad_sample_and_norm_sq, *_linear(_HALF)
    ),
    "linear clipped, bf16": functools.partial(linear.linear_clipped_grad, *_linear(_HALF), _FACTOR),
    "linear clipped, odd widths, bf16": functools.partial(
        linear.linear_clipped_grad, tensor(8, 197, 765), tensor(8, 197, 33), _FACTOR
    ),
    "linear clipped, one position, bf16": functools.partial(
        linear.linear_clipped_grad, *_linear(_HALF, 1), _FACTOR
    ),
    "linear tile-discard norm, few weights, bf16": functools.partial(
        linear.recompute_norm_sq, tensor(2, 1 << 20, 32), tensor(2, 1 << 20, 32)
    ),
    "linear norm, one position, bf16": functools.partial(linear.linear_norm_sq, *_linear(_HALF, 1)),
    "noise, fp32": functools.partial(noise.gaussian_noise_, _PARAMETER, 1.0, _KEY, 5),
    "key stream": functools.partial(
        noise.chacha20_blocks_, tensor(4096, 16, dtype=torch.int32), _KEY, 5
    ),
    "normals": functools.partial(noise.standard_normals, tensor(4096, 16, dtype=torch.int32)),
    "clip factor": functools.partial(clip.clip_factor, _FACTOR, 1.5),
    "finish, fp32": functools.partial(
        clip.finish_grads_,
        Sums([_PARAMETER], [_SAMPLES], [_FACTOR]),
        Finish(1.0, 0.1, _KEY),
        Places([5], [False]),
    ),
    "weighted sum, fp32": functools.partial(
        clip.finish_grads_,
        Sums([_PARAMETER], [_SAMPLES], [_FACTOR]),
        NOTHING_MORE,
        Places([0], [True]),
    ),
    "conv3d gradient and norm, bf16": functools.partial(
        conv.grad_sample_and_norm_sq, *_volumes(_HALF), _VOLUME
    ),
    "conv3d gradient and norm, channels last, bf16": functools.partial(
        conv.grad_sample_and_norm_sq, *_volumes(_HALF, torch.channels_last_3d), _VOLUME
    ),
    "conv3d tile-discard norm, fp32": functools.partial(
        conv.recompute_norm_sq, *_volumes(_FULL), _VOLUME
    ),
    "conv3d clipped, bf16": functools.partial(
        conv.conv_clipped_grad, *_volumes(_HALF), _FACTOR, _VOLUME
    ),
    "conv2d tile-discard norm, bf16": functools.partial(conv.recompute_norm_sq, *_IMAGES, _IMAGE),
    "conv2d channel gram, bf16": functools.partial(conv.channel_gram_norm_sq, *_IMAGES, _IMAGE),
    "group norm, bf16": functools.partial(
        affine.normalization_grad_sample,
        tensor(8, 32, 1 << 18),
        tensor(8, 32, 1 << 18),
        tensor(8, 8, dtype=_FULL),
        tensor(8, 8, dtype=_FULL),
    ),
    "layer norm, bf16": functools.partial(
        affine.normalization_last_grad_sample,
        tensor(8, 2048, 1024),
        tensor(8, 2048, 1024),
        tensor(8, 2048, dtype=_FULL),
        tensor(8, 2048, dtype=_FULL),
    ),
    "statistics, bf16": functools.partial(
        affine.normalization_statistics, tensor(8, 32, 1 << 18), 8, 1e-5
    ),
    "bias, fp32": functools.partial(affine.bias_grad_sample, tensor(8, 32, 1 << 18, dtype=_FULL)),
    "embedding norm, bf16": functools.partial(
        embedding.embedding_norm_sq, _TOKENS, tensor(8, 2048, 1024), -1
    ),
    "embedding clipped, bf16": functools.partial(
        embedding.embedding_clipped_grad, _TOKENS, tensor(8, 2048, 1024), _FACTOR, Table(50257, -1)
    ),
}

_POINT = Geometry((1, 1, 1), (1,), (0,), (1,), 1)
_ONE = tensor(1, dtype=_FULL)
_ONES = tensor(1, 1, 1), tensor(1, 1, 1)
_STATISTICS = tensor(1, 1, dtype=_FULL), tensor(1, 1, dtype=_FULL)
_INDEX = tensor(1, 1, dtype=torch.int64)

SIZES_OF_ONE: dict[str, Callable[[], object]] = {
    "outer": functools.partial(linear.outer_norm_sq, *_ONES),
    "gram": functools.partial(linear.gram_norm_sq, *_ONES),
    "gradient": functools.partial(linear.grad_sample_and_norm_sq, *_ONES),
    "rows": functools.partial(linear.linear_clipped_grad, *_ONES, _ONE),
    "combine": functools.partial(triton_support.combine, tensor(1, 1, 1, dtype=_FULL), True, True),
    "noise": functools.partial(noise.gaussian_noise_, _ONE, 1.0, _KEY, 0),
    "words": functools.partial(noise.chacha20_blocks_, tensor(1, 16, dtype=torch.int32), _KEY, 0),
    "normals": functools.partial(noise.standard_normals, tensor(1, 16, dtype=torch.int32)),
    "factor": functools.partial(clip.clip_factor, _ONE, 1.0),
    "finish": functools.partial(
        clip.finish_grads_,
        Sums([_ONE], [tensor(1, 1)], [_ONE]),
        Finish(1.0, 1.0, _KEY),
        Places([0], [True]),
    ),
    "conv gradient": functools.partial(conv.grad_sample_and_norm_sq, *_ONES, _POINT),
    "conv clipped": functools.partial(conv.conv_clipped_grad, *_ONES, _ONE, _POINT),
    "conv gram": functools.partial(conv.channel_gram_norm_sq, *_ONES, _POINT),
    "group norm": functools.partial(affine.normalization_grad_sample, *_ONES, *_STATISTICS),
    "layer norm": functools.partial(affine.normalization_last_grad_sample, *_ONES, *_STATISTICS),
    "statistics": functools.partial(affine.normalization_statistics, _ONES[0], 1, 1e-5),
    "fingerprint": functools.partial(fingerprints.fingerprint, _ONES[0]),
    "embedding norm": functools.partial(embedding.embedding_norm_sq, _INDEX, _ONES[0], -1),
    "embedding clipped": functools.partial(
        embedding.embedding_clipped_grad, _INDEX, _ONES[0], _ONE, Table(1, 0)
    ),
}
"""Triton compiles an argument that is 1 into the kernel, where it is no tensor any more."""

for _test in sorted(_TESTS.glob("test_triton_*.py")):
    # A test of Triton kernels may hold the cases of its own kernels.
    CASES |= getattr(importlib.import_module(f"tests.ops.{_test.stem}"), "AHEAD_OF_TIME", {})
