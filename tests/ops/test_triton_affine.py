"""Triton reductions of scales and shifts against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from dpkernels import ops
from tests.ops import shapes
from tests.ops.compare import assert_backend
from tests.ops.triton_device import DTYPES, MARKS, load, on_device

affine = load("dpkernels.ops.affine.triton")
triton_support = load("dpkernels.ops.triton_support")

pytestmark = MARKS

SHAPES = {name: shape for name, shape in shapes.REDUCTION.items() if shape[2] <= 65} | {
    "several slots": (2, 6, 150, 2)
}
CASES = [(name, torch.float32) for name in SHAPES] + [("odd", dtype) for dtype in DTYPES[1:]]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affine, "TILE_ELEMENTS", 64)
    monkeypatch.setattr(triton_support, "CHUNK_POSITIONS", 64)


def draw(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Operands of every op: channels first, channels last, and statistics for both."""
    batch, channels, positions, groups = SHAPES[name]
    generator = torch.Generator().manual_seed(13)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "input": normal(batch, channels, positions).to(dtype),
        "grad": normal(batch, channels, positions).to(dtype),
        "mean": normal(batch, groups).float(),
        "rstd": normal(batch, groups).exp().float(),
        "mean_last": normal(batch, positions).float(),
        "rstd_last": normal(batch, positions).exp().float(),
        "factor": torch.linspace(0.2, 1.0, batch),
    }


def calls(o: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, ...]]:
    """The arguments of every op of the family."""
    pair = o["input"], o["grad"]
    last = tuple(tensor.transpose(1, 2) for tensor in pair)
    return {
        "affine_grad_sample": pair,
        "affine_last_grad_sample": last,
        "bias_grad_sample": pair[1:],
        "bias_last_grad_sample": last[1:],
        "normalization_grad_sample": (*pair, o["mean"], o["rstd"]),
        "normalization_last_grad_sample": (*last, o["mean_last"], o["rstd_last"]),
        "affine_norm_sq": pair,
        "affine_clipped_grad": (*pair, o["factor"]),
    }


def check(op: str, args: tuple[torch.Tensor, ...]) -> None:
    """One op against the same maths in plain PyTorch and in float64."""
    assert_backend(getattr(ops, op), "triton", *args, place=lambda tensor: on_device(tensor)[0])


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    for op, args in calls(draw(name, dtype)).items():
        check(op, args)


@pytest.mark.parametrize("layout", [name for name in shapes.LAYOUTS if name != "contiguous"])
def test_any_memory_layout(layout: str) -> None:
    drawn = draw("odd", torch.float32)
    for name in ("input", "grad"):
        drawn[name] = shapes.LAYOUTS[layout](drawn[name])
    for op, args in calls(drawn).items():
        check(op, args)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("name", SHAPES)
def test_statistics(name: str, offset: float) -> None:
    """Also where the mean is a thousand standard deviations: the variance must not cancel."""
    groups = SHAPES[name][3]
    input = draw(name, torch.float32)["input"] + offset
    with ops.use_backend("reference"):
        exact = ops.normalization_statistics(input.double(), groups, 1e-5)
    (moved,) = on_device(input)
    with ops.use_backend("triton"):
        actual = ops.normalization_statistics(moved, groups, 1e-5)
    torch.testing.assert_close(actual.cpu().double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_bad_sample_stays_alone() -> None:
    drawn = draw("odd", torch.float32)
    drawn["input"][0, 0, 0] = torch.nan
    pair = on_device(drawn["input"], drawn["grad"])
    with ops.use_backend("triton"):
        norm_sq = ops.affine_norm_sq(*pair)
        total = ops.affine_clipped_grad(*pair, *on_device(torch.tensor([0.0, 1.0, 0.5])))
    assert norm_sq[0].isnan()
    assert norm_sq[1:].isfinite().all()
    assert total.isfinite().all()


def test_same_bits_twice() -> None:
    drawn = draw("several slots", torch.float32)
    args = on_device(*calls(drawn)["normalization_grad_sample"])
    with ops.use_backend("triton"):
        first, second = (ops.normalization_grad_sample(*args) for _ in range(2))
    assert torch.equal(first, second)


def test_mutation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is off by one percent fails the comparison that guards the suite."""
    honest = affine.bias_grad_sample
    monkeypatch.setattr(affine, "bias_grad_sample", lambda *args: honest(*args) * 1.01)
    with pytest.raises(pytest.fail.Exception, match="elements pass"):
        check("bias_grad_sample", calls(draw("odd", torch.float32))["bias_grad_sample"])
