"""Every kernel in the tiles, dtypes and layouts in which a GPU runs it, against float64 on the CPU.

Sizes lie just above one tile along every axis that is tiled, so each launch has several programs,
ragged edges and masks. Nothing is replaced by something smaller, unlike in the other tests of the
Triton kernels. Without a CUDA device the Triton kernels run under Triton's interpreter, where TF32
and bfloat16 products are those of float32; the CUDA extension's kernels then do not run.

Products of 16-bit numbers are exact in float32: such results may be off by float32 sums alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.ops.compare import ROUNDINGS, assert_as_exact_as_torch
from tests.ops.triton_device import MARKS, on_device

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TF32 = 2.0**-9 / (ROUNDINGS * torch.finfo(FP32).eps)
"""How much larger than float32's the error of a TF32 product may be.

Each of two operands is off by 2^-11 of itself where the matrix unit's operands are rounded, and by
up to 2^-10 where their last 13 bits are cut off.
"""

Truth = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Gradients in float32 by PyTorch, in float64, and of absolute values in float64."""

on_triton = pytest.mark.parametrize("backend", [pytest.param("triton", marks=MARKS)])
on_cuda = pytest.mark.parametrize("backend", [pytest.param("cuda", marks=pytest.mark.gpu)])
on_both = pytest.mark.parametrize(
    "backend",
    [pytest.param("triton", marks=MARKS), pytest.param("cuda", marks=pytest.mark.gpu)],
)


def cases(pairs: list[tuple[str, str]]) -> list[object]:
    """(name, form) as parameters; what the interpreter would only repeat is left to a device.

    It multiplies float16 and TF32 as it does bfloat16 and float32, and a gradient alone takes the
    path of a gradient and its norm.
    """
    repeats = [
        "fp16" in name or "TF32" in name or (form == "gradient" and name.startswith("conv"))
        for name, form in pairs
    ]
    return [
        pytest.param(*pair, marks=[pytest.mark.gpu] if repeat else [])
        for pair, repeat in zip(pairs, repeats, strict=True)
    ]


def norm_sq_of(truth: Truth) -> Truth:
    """Squared norms per sample; an error d of an element g moves its square by 2 g d."""
    plain, exact, magnitude = (each.flatten(1) for each in truth)
    return (
        plain.square().sum(1),
        exact.square().sum(1),
        2 * (exact.abs() * magnitude).sum(1),
    )


def clipped_of(truth: Truth, factor: torch.Tensor) -> Truth:
    plain, exact, magnitude = (
        torch.einsum("b,b...->...", factor.to(each.dtype), each) for each in truth
    )
    return plain, exact, magnitude


def factor_of(batch: int) -> torch.Tensor:
    """Clip factors [batch], one of them 0 where there are three or more."""
    factor = torch.linspace(0.2, 1.0, batch)
    if batch > 2:
        factor[1] = 0
    return factor


def check(actual: torch.Tensor, truth: Truth, rounded: bool) -> None:
    """Compare; `rounded`: whether the products were TF32."""
    plain, exact, magnitude = truth
    assert_as_exact_as_torch(actual.cpu(), plain, exact, magnitude * (TF32 if rounded else 1))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=FP64)


def check_one_gradient(
    forms: dict[str, Callable[[], torch.Tensor]],
    grads: torch.Tensor,
    clipped: torch.Tensor,
    truth: Truth,
    rounded: bool,
) -> None:
    """Every norm is that of the stored gradient, and the sum adds the stored bits."""
    stored = grads.cpu().double().flatten(1).square().sum(1)
    magnitude = norm_sq_of(truth)[2]
    for norm in forms.values():
        check(norm(), (stored.float(), stored, magnitude), rounded)
    assert torch.equal(clipped, grads[0])


def moved(backend: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors where `backend` runs."""
    if backend == "triton":
        return on_device(*tensors)
    return tuple(tensor.cuda() for tensor in tensors)
