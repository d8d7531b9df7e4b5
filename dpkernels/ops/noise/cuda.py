"""Noise on CUDA devices: one ChaCha20 block per thread."""

from dpkernels.ops.native import why_not_cuda as unavailable
from dpkernels.ops.noise.compiled import chacha20_blocks_, gaussian_noise_, standard_normals

__all__ = ["chacha20_blocks_", "gaussian_noise_", "standard_normals", "unavailable"]
