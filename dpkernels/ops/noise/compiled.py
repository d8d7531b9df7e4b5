"""Noise by the compiled kernels, CPU and CUDA alike (csrc/cpu/noise.cpp, csrc/cuda/noise.cu)."""

from __future__ import annotations

import torch

from dpkernels.ops import native


def gaussian_noise_(tensor: torch.Tensor, noise_std: float, key: torch.Tensor, block: int) -> None:
    if noise_std == 0 or tensor.numel() == 0:
        return
    flat = tensor.detach().contiguous()
    native.extension(flat).gaussian_noise(
        flat.data_ptr(),
        native.dtype_code(flat.dtype),
        flat.numel(),
        noise_std,
        native.key_bytes(key),
        block,
        native.launch_on(flat),
    )
    native.write_back(tensor, flat)


def chacha20_blocks_(words: torch.Tensor, key: torch.Tensor, block: int, nonce: int = 0) -> None:
    if len(words) == 0:
        return
    native.extension(words).chacha20_blocks(
        words.data_ptr(),
        len(words),
        native.key_bytes(key),
        block,
        nonce,
        native.launch_on(words),
    )
    native.write_back(words, words)


def standard_normals(words: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    source = words.contiguous()
    z = source.new_empty((len(source), 8), dtype=dtype)
    if len(source) > 0:
        native.extension(source).standard_normals(
            z.data_ptr(),
            native.dtype_code(dtype),
            source.data_ptr(),
            len(source),
            native.launch_on(source),
        )
    return z
