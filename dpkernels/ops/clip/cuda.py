"""The end of a DP step on CUDA devices: eight elements, one ChaCha20 block, per thread."""

from dpkernels.ops.clip.compiled import clip_factor, finish_grad_, weighted_sum_
from dpkernels.ops.native import why_not_cuda as unavailable

__all__ = ["clip_factor", "finish_grad_", "unavailable", "weighted_sum_"]
