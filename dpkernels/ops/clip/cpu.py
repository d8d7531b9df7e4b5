"""The end of a DP step on the CPU: C++ over chunks that stay in the first-level cache."""

from dpkernels.ops.clip.compiled import clip_factor, finish_grads_
from dpkernels.ops.native import why_not_cpu as unavailable

__all__ = ["clip_factor", "finish_grads_", "unavailable"]
