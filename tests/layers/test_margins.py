"""A search for contributions whose norm, in float64, exceeds C: docs/math.md, section 1.

What the engine sums for one sample is had through the very code that sums, with clip factors that
are zero for all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from dpkernels import ops
from dpkernels.engine.plan.strategies import held_by
from dpkernels.layers import margins
from dpkernels.layers.costs import Cost
from dpkernels.layers.operands import ConvOperand, EmbeddingOperand, LinearOperand, Operand
from dpkernels.ops.conv.geometry import Geometry
from dpkernels.ops.sums import squared_norms

BATCH = 4
Factors = tuple[torch.Tensor, torch.Tensor]


def tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 rounded to 10 explicit significand bits, as matrix units do with TF32 inputs."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).reshape(x.shape)


PRECISIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float32": lambda x: x.float(),
    "bfloat16": lambda x: x.bfloat16(),
    "float16": lambda x: x.half(),
    "tf32": lambda x: tf32(x.float()),
}


def spread(a: torch.Tensor, g: torch.Tensor) -> Factors:
    return a, g


def cancelling(a: torch.Tensor, g: torch.Tensor) -> Factors:
    """Equal activations whose gradients nearly add up to zero."""
    sign = torch.ones(g.shape[1]).index_fill(0, torch.arange(0, g.shape[1], 2), -1.0)
    return a[:, :1].expand_as(a), sign[:, None] * g[:, :1] * (1 + 1e-4 * g)


def huge_and_small(a: torch.Tensor, g: torch.Tensor) -> Factors:
    steps = torch.arange(g.shape[1])
    return a * (4.0 ** (steps % 7))[:, None], g * (4.0 ** -((3 * steps) % 11).float())[:, None]


def constant(a: torch.Tensor, g: torch.Tensor) -> Factors:
    """Every rounding of a running sum goes the same way."""
    return torch.full_like(a, 1 / 3), torch.full_like(g, 0.1) * g[:, :1, :1].abs()


KINDS = (spread, cancelling, huge_and_small, constant)
SHAPES = {"one": (1, 33, 17), "short": (7, 24, 40), "wide": (48, 96, 200), "long": (700, 12, 9)}


def factors(kind: Callable[..., Factors], shape: str) -> Factors:
    positions, inputs, outputs = SHAPES[shape]
    draw = torch.Generator().manual_seed(positions)
    a = torch.randn(BATCH, positions, inputs, generator=draw)
    g = torch.randn(BATCH, positions, outputs, generator=draw)
    return kind(a, g)


def linear(a: torch.Tensor, g: torch.Tensor) -> Operand:
    return LinearOperand(a, g)


def conv(a: torch.Tensor, g: torch.Tensor) -> Operand:
    """The same numbers as images of one row, seen by a kernel of three taps in two groups."""
    a, g = (t[..., : t.shape[2] - t.shape[2] % 4].transpose(1, 2) for t in (a, g))
    geometry = Geometry((g.shape[1], a.shape[1] // 2, 3), (1,), (1,), (1,), 2)
    return ConvOperand(a.contiguous(), g.contiguous(), geometry, BATCH)


def embedding(a: torch.Tensor, g: torch.Tensor) -> Operand:
    indices = torch.arange(g.shape[1]).remainder(3).expand(BATCH, -1)
    return EmbeddingOperand(indices, g, 5, -1)


def excess(operand: Operand, strategy: str, margin: bool = True) -> float:
    """The largest norm of a sample's contribution over C, less 1, for bounds of every size."""
    parameter = operand.grad_sample()[0]
    held = held_by(strategy, operand, parameter)
    if isinstance(held, torch.Tensor):
        norm_sq = squared_norms(held)
        bound = margins.of_values(norm_sq)
    else:
        norm_sq = held.norm_sq()
        bound = held.norm_bound(norm_sq)
    largest = float(bound.max())
    bound_sq = bound.square().float() if margin else norm_sq
    worst = -1.0
    for share in (0.5, 1e-3, 1e-6, 1e-8):
        clip = ops.clip_factor(bound_sq, share * largest)
        for b in range(BATCH):
            own = clip * torch.zeros(BATCH).index_fill(0, torch.tensor([b]), 1.0)
            if isinstance(held, torch.Tensor):
                summed = ops.weighted_sum_(torch.zeros_like(parameter), held, own)
            else:
                summed = held.clipped_grad(own)
            worst = max(worst, float(summed.double().norm()) / (share * largest) - 1.0)
    return worst


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("build", [linear, conv, embedding])
def test_no_contribution_exceeds_the_bound(build, shape: str, precision: str) -> None:
    rounded = PRECISIONS[precision]
    for kind in KINDS:
        operand = build(*(rounded(t) for t in factors(kind, shape)))
        offered = [n for n, offer in operand.offers().items() if isinstance(offer, Cost)]
        assert "store" in offered
        for strategy in offered:
            worst = excess(operand, strategy)
            assert worst <= 0.0, f"{kind.__name__}, {strategy}: C exceeded by {worst:.3g}"


@pytest.mark.parametrize(
    ("build", "shape", "strategy"), [(linear, "wide", "gram"), (conv, "wide", "channel_gram")]
)
def test_without_the_margin_the_search_finds_violations(build, shape, strategy) -> None:
    """Gram norms of gradients that cancel: what is summed is rounding, and may exceed any C."""
    operand = build(*factors(cancelling, shape))
    assert isinstance(operand.offers()[strategy], Cost)
    assert excess(operand, strategy, margin=False) > 0.0
    assert excess(operand, strategy) <= 0.0


@dataclass(frozen=True)
class Tf32Operand(LinearOperand):
    """Products as a matrix unit forms them: whatever enters them is rounded first."""

    def _rounded(self) -> LinearOperand:
        return LinearOperand(tf32(self.activations), tf32(self.backprops))

    def norm_sq(self) -> torch.Tensor:
        return self._rounded().norm_sq()

    def grad_sample(self) -> torch.Tensor:
        return self._rounded().grad_sample()

    def clipped_grad(self, clip_factor: torch.Tensor) -> torch.Tensor:
        scaled = self.backprops * clip_factor[:, None, None]
        kept = replace(self, backprops=scaled)._rounded()
        return kept.clipped_grad((clip_factor != 0).float())

    def part(self, samples: slice) -> LinearOperand:
        return Tf32Operand(self.activations[samples], self.backprops[samples])


@pytest.fixture
def reduced_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_rounded_operands(reduced_products: None, shape: str) -> None:
    """Under TF32 every strategy on offer is sound; Gram norms are not, and are not on offer."""
    found = -1.0
    for kind in KINDS:
        operand = Tf32Operand(*factors(kind, shape))
        offers = operand.offers()
        assert isinstance(offers["gram"], Cost) == (shape == "one")
        for strategy in [n for n, offer in offers.items() if isinstance(offer, Cost)]:
            assert excess(operand, strategy) <= 0.0, f"{kind.__name__}, {strategy}"
        found = max(found, excess(operand, "gram", margin=False))
    assert found > 0.0


def test_norms_of_long_rows_do_not_stagnate() -> None:
    """One float32 sum over ten million equal squares is off by whole percents."""
    row = torch.full((1, 10_000_000), 0.1)
    exact = float(row[0, 0].double()) ** 2 * row.numel()
    assert abs(float(squared_norms(row)) / exact - 1.0) < 1e-5
    assert squared_norms(row.double()).item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 9, 600), (1, 3, 256), (5, 1, 300)])
def test_norms_of_rows_that_lie_position_by_position(shape: tuple[int, ...]) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    exact = rows.double().flatten(1).square().sum(1)
    scattered = rows.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(squared_norms(scattered).double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(squared_norms(scattered.double()), exact, rtol=1e-14, atol=0)


def test_margins_are_small_where_nothing_cancels() -> None:
    """The bound costs utility: less than a percent of the norm for random operands."""
    operand = linear(*factors(spread, "wide"))
    norm_sq = operand.norm_sq()
    assert float((operand.norm_bound(norm_sq) / norm_sq.double().sqrt()).max()) < 1.01
