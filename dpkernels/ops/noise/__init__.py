"""Gaussian noise from ChaCha20 in counter mode (docs/math.md section 3).

The generator is the RFC 8439 block function with a 64-bit block counter (words 12 and 13) and a
nonce (words 14 and 15) that is zero for noise. A block has sixteen 32-bit words and makes eight
normals: words 4j and 4j+1 (low, high) are the 64-bit radius r, words 4j+2 and 4j+3 the angle a,

    u = (r + 1/2) 2^-64,  v = (a + 1/2) 2^-64
    z[2j] = sqrt(-2 ln u) cos(2 pi v),  z[2j+1] = sqrt(-2 ln u) sin(2 pi v).

Element i (flat, in contiguous order) of a call uses value i % 8 of block ``block + i // 8``: the
same noise on every backend up to float rounding, whatever the number of threads.

Integer noise takes one whole block per value, and is the same on every backend bit by bit.
"""

from __future__ import annotations

import math

import torch

from dpkernels.ops.checks import FLOAT_DTYPES
from dpkernels.ops.noise.source import NoiseSource, blocks_needed
from dpkernels.ops.registry import contract

__all__ = [
    "NoiseSource",
    "blocks_needed",
    "chacha20_blocks_",
    "check_noise",
    "discrete_gaussian_noise_",
    "discrete_gaussians",
    "gaussian_noise_",
    "standard_normals",
]


def check_noise(noise_std: float, key: torch.Tensor, block: int) -> None:
    """Raise ``ValueError`` unless the three describe a valid draw."""
    if not (math.isfinite(noise_std) and noise_std >= 0):
        raise ValueError(f"noise_std={noise_std}: expected a finite number >= 0")
    if key.dtype != torch.int64 or list(key.shape) != [4] or key.device.type != "cpu":
        raise ValueError(
            f"key: {key.dtype} {list(key.shape)} on {key.device}, expected int64 [4] on the CPU"
        )
    if not 0 <= block < 2**63:
        raise ValueError(f"block={block}: expected a block counter in [0, 2**63)")


#: integer noise is drawn for so many elements at a time: their words are 64 bytes each
_INTEGERS_AT_A_TIME = 2**16


def _require_words(words: torch.Tensor) -> None:
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[1] != 16:
        raise ValueError(f"words: {words.dtype} {list(words.shape)}, expected int32 [blocks, 16]")


def _check_gaussian_noise_(
    tensor: torch.Tensor, noise_std: float, key: torch.Tensor, block: int
) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"tensor: dtype {tensor.dtype}, expected one of {FLOAT_DTYPES}")
    check_noise(noise_std, key, block)


def _check_chacha20_blocks_(
    words: torch.Tensor, key: torch.Tensor, block: int, nonce: int = 0
) -> None:
    _require_words(words)
    if not words.is_contiguous():
        raise ValueError(f"words: strides {words.stride()}, expected a contiguous tensor")
    check_noise(0.0, key, block)


def _check_standard_normals(words: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    _require_words(words)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype={dtype}: expected float32 or float64")


@contract(check=_check_gaussian_noise_, mutates=("tensor",))
def gaussian_noise_(
    tensor: torch.Tensor, noise_std: float, key: torch.Tensor, block: int
) -> torch.Tensor:
    """Add ``noise_std * z`` in place, z standard normal.

    Args:
        tensor: any shape, float16/bfloat16/float32/float64. z has double precision where the
            tensor has, single precision otherwise.
        noise_std: standard deviation of what is added, >= 0.
        key: [4] int64 on the CPU, the 256-bit key in little-endian order.
        block: first block counter; the call uses ``blocks_needed(tensor.numel())`` of them.

    Returns:
        `tensor`.

    Guarantees:
        Independent normals with |z| <= 9.5 as long as no (key, block) is used twice;
        :class:`NoiseSource` sees to that.
    """
    return tensor


@contract(check=_check_chacha20_blocks_, mutates=("words",))
def chacha20_blocks_(
    words: torch.Tensor, key: torch.Tensor, block: int, nonce: int = 0
) -> torch.Tensor:
    """Write the raw ChaCha20 key stream (RFC 8439 section 2.3).

    Args:
        words: [blocks, 16] int32 (the bits of unsigned words), contiguous; overwritten.
        key: [4] int64 on the CPU, the 256-bit key in little-endian order.
        block: block counter of the first row, words 12 (low) and 13 of the state.
        nonce: words 14 (low) and 15 of the state.

    Returns:
        `words`.
    """
    return words


@contract(check=_check_standard_normals)
def standard_normals(words: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The transform alone: eight standard normals from the sixteen words of each block.

    Args:
        words: [blocks, 16] int32 (the bits of unsigned words).
        dtype: float32 or float64, the precision of the transform.

    Returns:
        [blocks, 8] of `dtype`.
    """
    return words.new_empty((len(words), 8), dtype=dtype)


@contract(check=_require_words)
def discrete_gaussians(words: torch.Tensor) -> torch.Tensor:
    """One discrete Gaussian integer from the sixteen words of each block.

    Every value costs the same operations: four searches of a fixed number of steps in one table.

    Args:
        words: [blocks, 16] int32 (the bits of unsigned words).

    Returns:
        [blocks] int64, variance ``dpkernels.ops.noise.table.VARIANCE``, mean 0.

    Guarantees:
        Within total variation ``dpkernels.ops.noise.table.STATISTICAL_DISTANCE`` of the discrete
        Gaussian where the words are uniform (docs/math.md section 3, "Integer noise").
    """
    return words.new_empty(len(words), dtype=torch.int64)


def discrete_gaussian_noise_(tensor: torch.Tensor, key: torch.Tensor, block: int) -> torch.Tensor:
    """Add independent discrete Gaussian integers in place.

    Args:
        tensor: any shape, int64, contiguous.
        key: [4] int64 on the CPU, as in ``gaussian_noise_``.
        block: first block counter; element i uses block ``block + i``.

    Returns:
        `tensor`.
    """
    if tensor.dtype != torch.int64 or not tensor.is_contiguous():
        raise ValueError(
            f"tensor: {tensor.dtype} with strides {tensor.stride()}, expected contiguous int64"
        )
    flat = tensor.view(-1)
    for first in range(0, flat.numel(), _INTEGERS_AT_A_TIME):
        part = flat[first : first + _INTEGERS_AT_A_TIME]
        words = torch.empty((part.numel(), 16), dtype=torch.int32, device=part.device)
        part += discrete_gaussians(chacha20_blocks_(words, key, block + first))
    return tensor
