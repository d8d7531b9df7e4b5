"""How results of an op are compared: tolerance from arithmetic, mismatches that explain themselves.

An op's error against float64 may be twice that of the same maths in plain PyTorch at the same
dtype, plus a few roundings of the sum's absolute terms (the usual forward error bound).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dpkernels.ops.registry import Op

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "cpu")
ROUNDINGS = 8


def skip_unless_runs(op: Op, backend: str, *args: object) -> None:
    """Skip where `backend` says why it cannot run these arguments."""
    reason = op.why_not(backend, *args)
    if reason:
        pytest.skip(f"{op.name} on {backend}: {reason}")


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let products of float32 matrices and convolutions be TF32, or forbid it, for a while.

    Nothing else of cuDNN changes; ``torch.backends.cudnn.flags`` would switch it off.
    """
    settings = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = allowed
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


def assert_as_exact_as_torch(
    actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor
) -> None:
    """Fail unless `actual` is within the tolerance of `exact` everywhere.

    Args:
        actual: the op's result.
        plain: the same maths by plain PyTorch at the inputs' dtype.
        exact: the truth in float64.
        magnitude: the truth for the absolute values of all inputs, float64: the size of the terms
            that were added.
    """
    wide = actual.dtype == torch.float64
    assert actual.dtype == (torch.float64 if plain.dtype == torch.float64 else torch.float32)
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    plain_error = (plain.double() - exact).abs().nan_to_num(0.0, 0.0).max()
    epsilon = torch.finfo(torch.float64 if wide else torch.float32).eps
    tolerance = 2 * plain_error + ROUNDINGS * epsilon * magnitude
    error = (actual.double() - exact).abs()
    good = error <= tolerance
    if not bool(good.all()):
        worst = int(torch.where(good, -1.0, error.nan_to_num(torch.inf)).argmax())
        position = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), exact.shape))
        pytest.fail(
            f"at {position}: {actual.flatten()[worst]:.9g}, exact {exact.flatten()[worst]:.9g},"
            f" tolerance {tolerance.expand_as(exact).flatten()[worst]:.3g};"
            f" {good.double().mean():.1%} of {exact.numel()} elements pass"
        )
