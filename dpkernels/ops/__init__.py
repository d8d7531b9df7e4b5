"""Pure functions on tensors: norms, per-sample gradients, clipping and noise.

Every op picks the best backend that can run it (`registry`); :func:`use_backend` or the environment
variable ``DPKERNELS_BACKEND`` forces one.
"""

from dpkernels.ops.affine import (
    affine_clipped_grad,
    affine_grad_sample,
    affine_last_grad_sample,
    affine_norm_sq,
    bias_grad_sample,
    bias_last_grad_sample,
    normalization_grad_sample,
    normalization_last_grad_sample,
    normalization_statistics,
)
from dpkernels.ops.clip import clip_factor, finish_grad_, finish_grads_, weighted_sum_
from dpkernels.ops.conv import conv_clipped_grad, conv_grad_sample, conv_norm_sq
from dpkernels.ops.embedding import (
    embedding_clipped_grad,
    embedding_grad_sample,
    embedding_norm_sq,
)
from dpkernels.ops.fingerprints import fingerprint
from dpkernels.ops.linear import linear_clipped_grad, linear_grad_sample, linear_norm_sq
from dpkernels.ops.noise import gaussian_noise_
from dpkernels.ops.recurrence import lstm, lstm_backward
from dpkernels.ops.registry import BackendUnavailable, all_ops, use_backend

__all__ = [
    "BackendUnavailable",
    "affine_clipped_grad",
    "affine_grad_sample",
    "affine_last_grad_sample",
    "affine_norm_sq",
    "all_ops",
    "bias_grad_sample",
    "bias_last_grad_sample",
    "clip_factor",
    "conv_clipped_grad",
    "conv_grad_sample",
    "conv_norm_sq",
    "embedding_clipped_grad",
    "embedding_grad_sample",
    "embedding_norm_sq",
    "fingerprint",
    "finish_grad_",
    "finish_grads_",
    "gaussian_noise_",
    "linear_clipped_grad",
    "linear_grad_sample",
    "linear_norm_sq",
    "lstm",
    "lstm_backward",
    "normalization_grad_sample",
    "normalization_last_grad_sample",
    "normalization_statistics",
    "use_backend",
    "weighted_sum_",
]
