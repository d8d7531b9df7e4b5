"""Triton fingerprints against the reference: the same bits, moments up to rounding."""

from __future__ import annotations

import functools

import pytest
import torch

from dpkernels import ops
from tests.ops.test_fingerprint import DTYPES, LAYOUTS, assert_same, draw
from tests.ops.triton_device import MARKS, load, on_device

triton = load("dpkernels.ops.fingerprints.triton")

pytestmark = MARKS


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_WIDTHS = {
    str(dtype): functools.partial(triton.fingerprint, _meta(8, 32, 64, 64, dtype=dtype))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8)
}
AHEAD_OF_TIME = {f"fingerprint, {name}": call for name, call in _WIDTHS.items()} | {
    f"fingerprint, sequence first, {dtype}": functools.partial(
        triton.fingerprint, _meta(2048, 8, 1024, dtype=dtype).transpose(0, 1)
    )
    for dtype in (torch.float64, torch.float32)
}


@pytest.fixture(autouse=True)
def several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "CHUNK_BLOCKS", 2)


def check(rows: torch.Tensor) -> None:
    """The fingerprint of `rows` by Triton against the reference."""
    with ops.use_backend("reference"):
        expected = ops.fingerprint(rows)
    with ops.use_backend("triton"):
        found = ops.fingerprint(*on_device(rows))
    assert_same([each.cpu() for each in found], expected, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(dtype: torch.dtype) -> None:
    check(draw((2, 3000), dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout: str) -> None:
    check(LAYOUTS[layout](draw((2, 12, 10, 9), torch.float32)))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2,), (1, 1)])
def test_few_values(shape: tuple[int, ...]) -> None:
    check(draw(shape, torch.float32))


def test_same_bits_twice() -> None:
    rows = on_device(draw((2, 6000), torch.float32))
    with ops.use_backend("triton"):
        first, second = (ops.fingerprint(*rows) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_bad_sample_stays_alone() -> None:
    rows = draw((3, 100), torch.float32)
    rows[1, 7] = torch.nan
    check(rows)


def test_rows_beyond_32_bit_offsets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.support, "INDEX_LIMIT", 100)
    for rows in (torch.ones(2, 100), torch.ones(2, 50, dtype=torch.complex64)):
        assert "100 values" in triton.why_not_fingerprint(*on_device(rows))
    assert triton.why_not_fingerprint(*on_device(torch.ones(200, 99))) is None
