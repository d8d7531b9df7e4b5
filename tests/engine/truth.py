"""One comparison of the engine with one sample at a time, as the engine's own tests need it."""

from __future__ import annotations

import torch
from torch import nn

from dpkernels.testing.truth import (
    Batch,
    Loss,
    Released,
    assert_released,
    fused,
    microbatching,
)

__all__ = ["Released", "assert_private", "assert_same", "fused", "microbatching", "relative_error"]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()).clamp(min=1e-30))


def assert_same(actual: Released, expected: Released, tolerance: float = 1e-9) -> None:
    """Every gradient and norm agrees, and some gradient is not zero."""
    whole = any(bool(g.any()) for g in expected.gradients.values())
    assert whole, "the comparison needs a gradient that is not zero"
    assert_released(actual, expected, tolerance)


def assert_private(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    max_grad_norm: float | None = None,
    *,
    tolerance: float = 1e-9,
    **geometry: int,
) -> None:
    """The engine releases what microbatching releases; C clips about half of the samples.

    Models keep their dtype, and what the engine refuses stays a ``ValueError``: otherwise
    :func:`dpkernels.testing.assert_per_sample` is the better test.
    """
    expected = microbatching(model, loss, batch, max_grad_norm, **geometry)
    actual = fused(model, loss, batch, expected.max_grad_norm, **geometry)
    assert_same(actual, expected, tolerance)
