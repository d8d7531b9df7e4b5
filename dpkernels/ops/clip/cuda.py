"""The end of a DP step on CUDA devices: all tensors in one launch, one ChaCha20 block per
thread."""

from dpkernels.ops.clip.compiled import clip_factor, finish_grads_
from dpkernels.ops.native import why_not_cuda as unavailable

__all__ = ["clip_factor", "finish_grads_", "unavailable"]
