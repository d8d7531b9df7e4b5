"""Noise on the CPU: C++, one ChaCha20 block per vector lane."""

from dpkernels.ops.native import why_not_cpu as unavailable
from dpkernels.ops.noise.compiled import chacha20_blocks_, gaussian_noise_, standard_normals

__all__ = ["chacha20_blocks_", "gaussian_noise_", "standard_normals", "unavailable"]
