"""ChaCha20 and Box-Muller in vectorised NumPy, double precision: slow and right."""

from __future__ import annotations

import numpy as np
import torch

from dpkernels.ops.noise import table
from dpkernels.ops.noise.source import blocks_needed

#: turns the order of unsigned numbers into that of signed ones
_SIGN_BIT = -(2**63)
_CONSTANTS = np.frombuffer(b"expand 32-byte k", dtype="<u4")
_COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))


def chacha20_words(key: bytes, block: int, count: int, nonce: int = 0) -> np.ndarray:
    """The key stream [count, 16] uint32 of blocks `block`, `block` + 1, ... (RFC 8439, 2.3)."""
    counter = (np.arange(count, dtype=np.uint64) + np.uint64(block)).astype("<u8")
    state = np.empty((16, count), dtype=np.uint32)
    state[:4] = _CONSTANTS[:, None]
    state[4:12] = np.frombuffer(key, dtype="<u4")[:, None]
    state[12:14] = counter.view("<u4").reshape(count, 2).T
    state[14:] = np.array([nonce], dtype="<u8").view("<u4")[:, None]
    x = state.copy()
    for _ in range(10):
        for a, b, c, d in _COLUMNS + _DIAGONALS:
            for target, other, moved, bits in (
                (a, b, d, 16),
                (c, d, b, 12),
                (a, b, d, 8),
                (c, d, b, 7),
            ):
                x[target] += x[other]
                x[moved] ^= x[target]
                x[moved] = (x[moved] << np.uint32(bits)) | (x[moved] >> np.uint32(32 - bits))
    return np.ascontiguousarray((x + state).T)


def normals_of(words: np.ndarray) -> np.ndarray:
    """Eight normals per block by Box-Muller: [count, 16] uint32 -> [count, 8] float64."""
    pairs = words.astype("<u4").view("<u8").reshape(len(words), 4, 2)
    r, a = pairs[..., 0], pairs[..., 1]
    upper = r >= np.uint64(2**63)
    distance = (np.where(upper, ~r, r).astype(np.float64) + 0.5) * 2.0**-64
    radius = np.sqrt(-2.0 * np.where(upper, np.log1p(-distance), np.log(distance)))
    angle = 2.0 * np.pi * ((a.astype(np.int64).astype(np.float64) + 0.5) * 2.0**-64)
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1).reshape(-1, 8)


def noise_like(tensor: torch.Tensor, key: torch.Tensor, block: int) -> torch.Tensor:
    """z for `tensor`: same shape and device, float64."""
    words = chacha20_words(key.numpy().tobytes(), block, blocks_needed(tensor.numel()))
    z = torch.from_numpy(normals_of(words).reshape(-1)[: tensor.numel()])
    return z.reshape(tensor.shape).to(tensor.device)


def gaussian_noise_(tensor: torch.Tensor, noise_std: float, key: torch.Tensor, block: int) -> None:
    if noise_std == 0:
        return
    with torch.no_grad():
        tensor.copy_(tensor.double() + noise_std * noise_like(tensor, key, block))


def chacha20_blocks_(words: torch.Tensor, key: torch.Tensor, block: int, nonce: int = 0) -> None:
    stream = chacha20_words(key.numpy().tobytes(), block, len(words), nonce)
    words.copy_(torch.from_numpy(stream.view(np.int32)))


def standard_normals(words: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    z = normals_of(words.cpu().contiguous().numpy().view(np.uint32))
    return torch.from_numpy(z).to(words.device, dtype)


def discrete_gaussians(words: torch.Tensor) -> torch.Tensor:
    high_of, low_of = (
        torch.from_numpy(column.view(np.int64) ^ _SIGN_BIT).to(words.device)
        for column in np.ascontiguousarray(table.thresholds().T)
    )
    uniform = words.contiguous().view(torch.int64) ^ _SIGN_BIT
    total = torch.zeros(len(words), dtype=torch.int64, device=words.device)
    for level in reversed(range(table.LEVELS)):
        low, high = uniform[:, 2 * level], uniform[:, 2 * level + 1]
        found = torch.zeros_like(total)
        for step in reversed(range(table.SEARCH_STEPS)):
            candidate = found + (1 << step)
            threshold = high_of[candidate - 1]
            reached = (threshold < high) | ((threshold == high) & (low_of[candidate - 1] <= low))
            found = torch.where(reached, candidate, found)
        total = total * table.RADIX + found.clamp(max=2 * table.LIMIT) - table.LIMIT
    return total
