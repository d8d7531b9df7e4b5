"""CPU embedding gradients: compiled kernels where there are any, else the library."""

from __future__ import annotations

from dpkernels.ops import native
from dpkernels.ops.embedding import compiled, scatter

_kernels = compiled if native.why_not_cpu() is None else scatter

embedding_norm_sq = _kernels.embedding_norm_sq
embedding_grad_sample = _kernels.embedding_grad_sample
embedding_clipped_grad = _kernels.embedding_clipped_grad
