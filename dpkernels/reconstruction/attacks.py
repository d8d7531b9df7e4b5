"""The attacks by the name they had before they moved to :mod:`dpkernels.attacks`."""

from dpkernels.attacks import gradient_matching, imprint, linear_optimal, trap_weights

__all__ = ["gradient_matching", "imprint", "linear_optimal", "trap_weights"]
