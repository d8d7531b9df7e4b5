"""Linear layers on the CPU: the library's matrix products win at every size that was measured."""

from dpkernels.ops.linear.library import linear_clipped_grad, linear_grad_sample, linear_norm_sq

__all__ = ["linear_clipped_grad", "linear_grad_sample", "linear_norm_sq"]
