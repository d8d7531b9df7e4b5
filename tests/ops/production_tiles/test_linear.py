"""Linear layers: gradients, norms and clipped sums, in whole tiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

from tests.ops.compare import tf32
from tests.ops.production_tiles.support import (
    BF16,
    FP16,
    FP32,
    Truth,
    cases,
    check,
    check_one_gradient,
    clipped_of,
    drawn,
    factor_of,
    norm_sq_of,
    on_triton,
)
from tests.ops.shapes import LAYOUTS
from tests.ops.test_linear import truths
from tests.ops.triton_device import DEVICE, load, on_device

linear = load("dpkernels.ops.linear.triton")


@dataclass(frozen=True)
class Linear:
    """(B, T, I, O), the operands' dtypes and memory layout, and whether TF32 is allowed."""

    shape: tuple[int, int, int, int]
    dtypes: tuple[torch.dtype, torch.dtype]
    layout: str = "contiguous"
    tf32: bool = False

    @property
    def rounded(self) -> bool:
        return self.tf32 and FP32 in self.dtypes


LINEAR = {
    "bf16": Linear((2, 144, 160, 144), (BF16, BF16)),
    "bf16, odd widths": Linear((2, 197, 165, 133), (BF16, BF16)),
    "bf16, positions fastest": Linear((2, 144, 160, 144), (BF16, BF16), "channels last"),
    "bf16, few weights, several slots": Linear((3, 2100, 32, 32), (BF16, BF16)),
    "bf16, less than a tile": Linear((2, 40, 48, 24), (BF16, BF16)),
    "fp16": Linear((2, 144, 160, 144), (FP16, FP16)),
    "fp32, IEEE": Linear((2, 80, 96, 80), (FP32, FP32)),
    "fp32, TF32": Linear((2, 80, 96, 80), (FP32, FP32), tf32=True),
    "bf16 and fp32, IEEE": Linear((2, 80, 96, 80), (BF16, FP32)),
}
GRAM_LINEAR = [name for name, case in LINEAR.items() if case.shape[1] < 1000]
ROWS = {
    "bf16, short rows": Linear((30, 5, 96, 80), (BF16, BF16)),
    "bf16, one position": Linear((80, 1, 96, 80), (BF16, BF16)),
    "bf16, short rows, several slots": Linear((300, 7, 32, 32), (BF16, BF16)),
    "fp16, short rows": Linear((30, 5, 96, 80), (FP16, FP16)),
    "fp32, short rows, IEEE": Linear((30, 5, 96, 80), (FP32, FP32)),
    "fp32, short rows, TF32": Linear((30, 5, 96, 80), (FP32, FP32), tf32=True),
}
OUTER = {
    "bf16": Linear((3, 1, 1100, 1040), (BF16, BF16)),
    "fp32": Linear((3, 1, 1100, 1040), (FP32, FP32)),
}


@functools.cache
def linear_case(case: Linear) -> tuple[tuple[torch.Tensor, torch.Tensor], Truth]:
    """The operands on the CPU, and the truth."""
    batch, positions, inputs, outputs = case.shape
    activations, grads = (
        LAYOUTS[case.layout](drawn(batch, positions, width, seed=width).to(dtype))
        for width, dtype in zip((inputs, outputs), case.dtypes, strict=True)
    )
    return (activations, grads), truths(activations.float(), grads.float())


def _linear_forms() -> list[tuple[str, str]]:
    forms = ("gradient", "gradient and norm", "tile-discard norm", "clipped sum")
    every = [(name, form) for name in LINEAR for form in forms]
    return every + [(name, "Gram norm") for name in GRAM_LINEAR]


@pytest.mark.parametrize(("name", "form"), cases(_linear_forms()))
@on_triton
def test_linear(backend: str, name: str, form: str) -> None:
    case = LINEAR[name]
    operands, truth = linear_case(case)
    factor = factor_of(len(operands[0]))
    *moved, weight = on_device(*operands, factor)
    with tf32(case.tf32):
        if form == "gradient":
            check(linear.linear_grad_sample(*moved), truth, case.rounded)
        elif form == "gradient and norm":
            grads, norm_sq = linear.grad_sample_and_norm_sq(*moved)
            check(grads, truth, case.rounded)
            check(norm_sq, norm_sq_of(truth), case.rounded)
        elif form == "tile-discard norm":
            check(linear.recompute_norm_sq(*moved), norm_sq_of(truth), case.rounded)
        elif form == "Gram norm":
            check(linear.gram_norm_sq(*moved), norm_sq_of(truth), case.rounded)
        else:
            total = linear.linear_clipped_grad(*moved, weight)
            check(total, clipped_of(truth, factor), case.rounded)


@pytest.mark.parametrize("name", ROWS)
@on_triton
def test_linear_clipped_sum_of_short_samples(backend: str, name: str) -> None:
    case = ROWS[name]
    operands, truth = linear_case(case)
    factor = factor_of(len(operands[0]))
    assert case.shape[1] < linear.ROW_FORM_POSITIONS
    with tf32(case.tf32):
        total = linear.linear_clipped_grad(*on_device(*operands, factor))
    check(total, clipped_of(truth, factor), case.rounded)


@pytest.mark.parametrize("name", OUTER)
@on_triton
def test_linear_norm_of_one_position(backend: str, name: str) -> None:
    operands, truth = linear_case(OUTER[name])
    check(linear.linear_norm_sq(*on_device(*operands)), norm_sq_of(truth), rounded=False)


@pytest.mark.parametrize("name", ["bf16", "bf16, few weights, several slots", "fp16", "fp32, TF32"])
@on_triton
def test_linear_norms_and_sum_are_those_of_the_stored_gradient(backend: str, name: str) -> None:
    case = LINEAR[name]
    operands, truth = linear_case(case)
    moved = on_device(*operands)
    one = torch.ones(1, device=DEVICE)
    with tf32(case.tf32):
        grads, norm_sq = linear.grad_sample_and_norm_sq(*moved)
        forms = {
            "stored": lambda: norm_sq,
            "discarded": lambda: linear.recompute_norm_sq(*moved),
        }
        if name in GRAM_LINEAR:
            forms["Gram"] = lambda: linear.gram_norm_sq(*moved)
        clipped = linear.linear_clipped_grad(*(each[:1] for each in moved), one)
        check_one_gradient(forms, grads, clipped, truth, case.rounded)
