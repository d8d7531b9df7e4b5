"""Norms and clipped sums by an op's own per-sample gradients: where those are small, or to check.

Norm and sum come from the same values, so that rounding cannot set them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dpkernels.ops.checks import kept_samples

Gradients = Callable[..., torch.Tensor]
"""(input, grad_output, ...) -> [B, *shape], B on the first axis of both operands."""


def norm_sq_by(grad_sample: Gradients) -> Gradients:
    """The function of the same arguments that returns the gradients' squared norms, [B]."""

    def norm_sq(*arguments: Any) -> torch.Tensor:
        return grad_sample(*arguments).flatten(1).square().sum(1)

    return norm_sq


def clipped_grad_by(grad_sample: Gradients) -> Gradients:
    """The function of (input, grad_output, clip_factor, ...) that returns their clipped sum.

    A sample whose factor is 0 is left out, even where its values are not finite.
    """

    def clipped_grad(
        input: torch.Tensor, grad_output: torch.Tensor, clip_factor: torch.Tensor, *rest: Any
    ) -> torch.Tensor:
        factor, operands = kept_samples(clip_factor, input, grad_output)
        grads = grad_sample(*operands, *rest)
        return (grads * factor.to(grads.dtype).view(-1, *[1] * (grads.ndim - 1))).sum(0)

    return clipped_grad
