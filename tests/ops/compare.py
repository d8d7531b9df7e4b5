"""How results of an op are compared: tolerance from arithmetic, mismatches that explain themselves.

An op's error against float64 may be twice that of the same maths in plain PyTorch at the same
dtype, plus a few roundings of the sum's absolute terms (the usual forward error bound).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dpkernels.ops import native
from dpkernels.ops.registry import Op, use_backend

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = (
    "reference",
    "library",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
    ),
)
ROUNDINGS = 8


def skip_unless_runs(op: Op, backend: str, *args: object) -> None:
    """Skip where `backend` says why it cannot run these arguments."""
    reason = op.why_not(backend, *args)
    if reason:
        pytest.skip(f"{op.name} on {backend}: {reason}")


def assert_backend(
    op: Op,
    backend: str,
    *arguments: Any,
    place: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> None:
    """Fail unless `op` on `backend` is as exact as the reference.

    The truth is the reference in float64; the size of the terms that are added is its result for
    the operands' absolute values (and minus that of a mean, which is taken off).

    Args:
        op: one that :mod:`tests.ops.hostile` knows.
        backend: its name.
        arguments: flat, on the CPU.
        place: moves a tensor to where the backend takes it.
    """
    wide = _mapped(arguments, torch.Tensor.double)
    names = inspect.signature(op).parameters
    sizes = tuple(_size(*each) for each in zip(names, wide, strict=False))
    with use_backend("reference"):
        plain, exact, magnitude = (
            _results(op(*each)) for each in (_mapped(arguments, torch.clone), wide, sizes)
        )
    with use_backend(backend):
        actual = _results(op(*_mapped(arguments, place)))
    for found, *truths in zip(actual, plain, exact, magnitude, strict=True):
        assert_as_exact_as_torch(found.cpu(), *truths)


def _size(name: str, value: Any) -> Any:
    sign = -1.0 if name == "mean" else 1.0
    return _mapped((value,), lambda tensor: sign * tensor.abs())[0]


def _mapped(
    arguments: Iterable[Any], change: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[Any, ...]:
    """The arguments, `change` applied to each floating-point tensor."""

    def of(value: Any) -> Any:
        if isinstance(value, list):
            return [of(each) for each in value]
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return change(value) if floats else value

    return tuple(of(value) for value in arguments)


def _results(result: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return result if isinstance(result, list) else [result]


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
