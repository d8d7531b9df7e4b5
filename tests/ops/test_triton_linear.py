"""Triton kernels of linear layers against one sample at a time, in the smallest tiles."""

from __future__ import annotations

import pytest
import torch

from dpkernels import ops
from tests.ops import shapes
from tests.ops.compare import assert_as_exact_as_torch
from tests.ops.test_linear import square_sums, truths
from tests.ops.triton_device import DTYPES, MARKS, load, on_device

linear = load("dpkernels.ops.linear.triton")
triton_support = load("dpkernels.ops.triton_support")

pytestmark = MARKS

SHAPES = {name: shape for name, shape in shapes.LINEAR.items() if shape[1] < 16} | {
    "several tiles": (2, 33, 20, 18),
    "long, narrow": (2, 40, 3, 2),
}
CASES = [(name, torch.float32) for name in SHAPES] + [
    (name, dtype) for name in ("one position", "odd", "several tiles") for dtype in DTYPES[1:]
]
SMALL = linear.Tile(16, 16, 16, 4, 2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "GRAM", {2: SMALL, 4: SMALL})
    monkeypatch.setattr(linear, "GRADIENT", {2: SMALL, 4: SMALL})
    monkeypatch.setattr(linear, "ROWS", SMALL)
    monkeypatch.setattr(triton_support, "CHUNK_POSITIONS", 16)


def operands(
    name: str, dtype: torch.dtype, layout: str = "contiguous"
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, positions, inputs, outputs = SHAPES[name]
    generator = torch.Generator().manual_seed(11)
    drawn = (
        torch.randn(batch, positions, n, generator=generator, dtype=torch.float64).to(dtype)
        for n in (inputs, outputs)
    )
    activations, grad_output = (shapes.LAYOUTS[layout](each) for each in drawn)
    return activations, grad_output


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_equals_one_sample_at_a_time(name: str, dtype: torch.dtype) -> None:
    activations, grad_output = operands(name, dtype)
    grads = truths(activations, grad_output)
    factor = torch.linspace(0.2, 1.0, len(activations), dtype=torch.float32)
    clipped = tuple(torch.einsum("b,boi->oi", factor.to(g.dtype), g) for g in grads)
    activations, grad_output, factor = on_device(activations, grad_output, factor)
    with ops.use_backend("triton"):
        actual = ops.linear_grad_sample(activations, grad_output)
        norm_sq = ops.linear_norm_sq(activations, grad_output)
        total = ops.linear_clipped_grad(activations, grad_output, factor)
    assert_as_exact_as_torch(actual.cpu(), *grads)
    assert_as_exact_as_torch(norm_sq.cpu(), *square_sums(grads))
    assert_as_exact_as_torch(total.cpu(), *clipped)


@pytest.mark.parametrize("form", ["gram_norm_sq", "recompute_norm_sq", "grad_sample_and_norm_sq"])
@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if 0 not in shape])
def test_every_norm_strategy(name: str, form: str) -> None:
    activations, grad_output = operands(name, torch.float32)
    truth = square_sums(truths(activations, grad_output))
    result = getattr(linear, form)(*on_device(activations, grad_output))
    norm_sq = result[1] if isinstance(result, tuple) else result
    assert_as_exact_as_torch(norm_sq.cpu(), *truth)


@pytest.mark.parametrize("layout", [name for name in shapes.LAYOUTS if name != "contiguous"])
def test_any_memory_layout(layout: str) -> None:
    operands_of = operands("several tiles", torch.float32, layout)
    grads = truths(*operands_of)
    moved = on_device(*operands_of)
    with ops.use_backend("triton"):
        assert_as_exact_as_torch(ops.linear_grad_sample(*moved).cpu(), *grads)
    assert_as_exact_as_torch(linear.gram_norm_sq(*moved).cpu(), *square_sums(grads))


def test_operands_of_two_dtypes() -> None:
    activations, grad_output = operands("odd", torch.float16)
    activations = activations.float()
    grads = truths(activations, grad_output.float())
    moved = on_device(activations, grad_output)
    with ops.use_backend("triton"):
        assert_as_exact_as_torch(ops.linear_grad_sample(*moved).cpu(), *grads)
    assert_as_exact_as_torch(linear.gram_norm_sq(*moved).cpu(), *square_sums(grads))


@pytest.mark.parametrize("name", ["one position", "odd", "several tiles"])
def test_a_bad_sample_stays_alone(name: str) -> None:
    activations, grad_output = on_device(*operands(name, torch.bfloat16))
    factor = torch.ones(len(activations), device=activations.device)
    clean = activations.clone()
    clean[0] = 0
    activations[0, 0, 0] = torch.nan
    factor_without = factor.clone()
    factor_without[0] = 0
    with ops.use_backend("triton"):
        norm_sq = ops.linear_norm_sq(activations, grad_output)
        rest = ops.linear_clipped_grad(activations, grad_output, factor_without)
        alone = ops.linear_clipped_grad(clean, grad_output, factor)
    gram = linear.gram_norm_sq(activations, grad_output)
    for norms in (norm_sq, gram):
        assert norms[0].isnan()
        assert norms[1:].isfinite().all()
    assert torch.equal(rest, alone)


def test_the_clipped_sum_adds_what_the_norm_saw() -> None:
    """One sample, factor 1: bit for bit the gradient whose norm was taken (sound clipping)."""
    activations, grad_output = on_device(*operands("several tiles", torch.bfloat16))
    sample = activations[:1], grad_output[:1]
    grads, norm_sq = linear.grad_sample_and_norm_sq(*sample)
    total = linear.linear_clipped_grad(*sample, torch.ones(1, device=grads.device))
    assert torch.equal(total, grads[0])
    assert torch.equal(norm_sq, linear.recompute_norm_sq(*sample))


@pytest.mark.parametrize("name", ["odd", "several tiles"])
def test_same_bits_twice(name: str) -> None:
    activations, grad_output = on_device(*operands(name, torch.float32))
    factor = torch.linspace(0.2, 1.0, len(activations), device=activations.device)

    def results() -> list[torch.Tensor]:
        return [
            *linear.grad_sample_and_norm_sq(activations, grad_output),
            linear.gram_norm_sq(activations, grad_output),
            linear.linear_clipped_grad(activations, grad_output, factor),
        ]

    for first, second in zip(results(), results(), strict=True):
        assert torch.equal(first, second)


def test_mutation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that is off by one percent fails the comparison that guards the suite."""
    honest = linear.linear_norm_sq
    monkeypatch.setattr(linear, "linear_norm_sq", lambda *args: honest(*args) * 1.01)
    with pytest.raises(pytest.fail.Exception, match="elements pass"):
        test_equals_one_sample_at_a_time("odd", torch.float32)


@pytest.mark.parametrize(
    ("positions", "weights", "slots"),
    [(0, 4, 1), (1, 4, 1), (16, 4, 1), (17, 4, 2), (10**6, 4, 128), (10**6, 1 << 21, 1)],
)
def test_split_factors_cover_every_position(positions: int, weights: int, slots: int) -> None:
    got, chunk = triton_support.split_factor(positions, weights)
    assert got <= slots
    assert got == 1 or slots - got <= slots // 8
    assert got * chunk >= positions > (got - 1) * chunk or positions == 0
