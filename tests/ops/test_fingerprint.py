"""Fingerprints: every backend against the definition in Python's numbers, and what they notice."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from dpkernels import ops
from dpkernels.ops import native
from dpkernels.ops.fingerprints import cpu, reference
from dpkernels.ops.fingerprints.runs import runs_of
from tests.ops.compare import skip_unless_runs

ROOT = Path(__file__).resolve().parent.parent.parent
BACKENDS = (
    "reference",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
    ),
)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = (*FLOATS, *INTEGERS, torch.complex64, torch.complex128)

SHAPES = (
    (3, 1),
    (1, 7),
    (2, 1023),
    (2, 1024),
    (3, 1025),
    (2, 5, 7, 11, 13),
    (1, 70_001),
    (4,),
    (0, 5),
    (3, 0),
    (2, 3, 0, 4),
)
"""Of rows: about a block of 1024, and more than what one thread adds up at a time."""

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "axes turned around": lambda x: x.permute(0, 3, 2, 1),
    "sequence first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "samples last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "runs": lambda x: x[..., 2:-1],
    "every second": lambda x: x[..., ::2],
    "a box": lambda x: x[:, 1:-1, 2:, :5],
    "a box, turned around": lambda x: x[:, 1:-1, 2:, :5].transpose(1, 3),
    "one value in all places": lambda x: x[:1, :1, :1, :1].expand_as(x),
    "one sample in all places": lambda x: x[:1].expand_as(x),
    "one run in all places": lambda x: x[:, :, :1].expand_as(x),
    "windows that overlap": lambda x: x.flatten(1).unfold(1, 20, 3),
    "one column": lambda x: x[:, 3:4, :, 2:3],
    "offset by one": lambda x: x.flatten()[1:].as_strided((2, 300), (301, 1)),
}
"""Views of [2, 12, 10, 9] or larger; the last axes come in another order or with gaps."""

Fingerprint = Sequence[torch.Tensor]


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Values of both signs and many sizes; integers of the whole range."""
    generator = torch.Generator().manual_seed(sum(shape))
    if dtype in INTEGERS:
        drawn = torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)
        return drawn % 2 == 0 if dtype == torch.bool else (drawn >> 7).to(dtype)
    real = torch.randn((2, *shape), generator=generator, dtype=torch.float64) * 3
    return torch.complex(*real).to(dtype) if dtype.is_complex else real[0].to(dtype)


def assert_same(found: Fingerprint, expected: Fingerprint, rows: torch.Tensor) -> None:
    """Fail unless bits are equal and moments are up to the rounding of sums in float64."""
    assert torch.equal(found[0], expected[0])
    assert found[1].dtype == torch.float64
    values = rows.resolve_conj()
    values = torch.view_as_real(values) if values.is_complex() else values
    wide = values.double().abs().flatten(1) if values.ndim > 1 else values.double().abs()[:, None]
    sizes = torch.stack([wide.sum(1), wide.square().sum(1), wide.sum(1)], 1)
    close = (found[1] - expected[1]).abs() <= 1e-14 * sizes
    same = (found[1] == expected[1]) | (found[1].isnan() & expected[1].isnan())
    assert bool((close | same).all()), (found[1], expected[1])


def run(backend: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with ops.use_backend(backend):
        return ops.fingerprint(rows)


def _mixed(place: int, seed: int) -> int:
    x = place ^ seed
    x = ((x ^ x >> 16) * 0x85EBCA6B) % 2**32
    x = ((x ^ x >> 13) * 0xC2B2AE35) % 2**32
    return (x ^ x >> 16) | 1


def by_hand(row: Sequence[float], code: str) -> tuple[list[int], list[float]]:
    """The definition, for the values of one row and their code in :mod:`struct`."""
    bits, terms = [0, 0], []
    seeds = (0x9E3779B9, 0x27D4EB2F), (0xC2B2AE35, 0x165667B1)
    for place, value in enumerate(row):
        block, at = divmod(place, 1024)
        word = int.from_bytes(struct.pack("<" + code, value), "little")
        for i, (inner, outer) in enumerate(seeds):
            of_block = _mixed(block, outer)
            for half, part in enumerate((word % 2**32, word >> 32)):
                bits[i] += part * _mixed(at + 1024 * half, inner) * of_block
        number = _mixed(at + 8 * (_mixed(block, seeds[0][1]) >> 25), seeds[0][0])
        terms.append(-value if number >> 31 else value)
    sums = [math.fsum(row), math.fsum(v * v for v in row), math.fsum(terms)]
    return [(each + 2**63) % 2**64 - 2**63 for each in bits], sums


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "code"),
    [
        (torch.float64, "d"),
        (torch.float32, "f"),
        (torch.float16, "e"),
        (torch.int8, "b"),
        (torch.int16, "h"),
        (torch.int64, "q"),
    ],
    ids=str,
)
def test_the_definition(dtype: torch.dtype, code: str, backend: str) -> None:
    rows = draw((2, 2100), dtype)
    bits, moments = zip(*(by_hand(row, code) for row in rows.tolist()), strict=True)
    expected = torch.tensor(bits), torch.tensor(moments, dtype=torch.float64)
    assert_same(run(backend, rows), expected, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows = draw(shape, dtype)
    skip_unless_runs(ops.fingerprint, "cpu", rows)
    assert_same(run("cpu", rows), run("reference", rows), rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout: str, dtype: torch.dtype, backend: str) -> None:
    """As of a contiguous tensor whose axes are in the order of the strides."""
    rows = LAYOUTS[layout](draw((2, 12, 10, 90), dtype))
    order = sorted(range(1, rows.ndim), key=rows.stride, reverse=True)
    plain = rows.permute(0, *order).contiguous()
    assert_same(run(backend, rows), run("reference", plain), rows)


@pytest.mark.parametrize(
    "layout",
    [n for n in LAYOUTS if not n.startswith(("a box", "one run"))],
)
def test_runs_are_read_where_they_lie(layout: str) -> None:
    rows = LAYOUTS[layout](draw((2, 12, 10, 90), torch.float32))
    assert runs_of(rows).tensor.data_ptr() == rows.data_ptr()
    assert runs_of(rows).view().shape.numel() == rows.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazy_views_count_as_what_they_show(backend: str) -> None:
    complex_rows = draw((2, 50), torch.complex64)
    for lazy in (complex_rows.conj(), complex_rows.conj().imag):
        plain = lazy.resolve_conj().resolve_neg().clone()
        assert_same(run(backend, lazy), run("reference", plain), lazy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient(backend: str) -> None:
    for results in run(backend, torch.ones(2, 3, requires_grad=True)):
        assert not results.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_bit_changes_both_sums(dtype: torch.dtype, backend: str) -> None:
    rows = draw((1, 3), dtype).expand(64, 3).clone()
    width = 8 * rows.element_size()
    words = rows.view({16: torch.int16, 32: torch.int32, 64: torch.int64}[width])
    for bit in range(width):
        words[bit, 1] ^= 1 << bit if bit < width - 1 else -(1 << bit)
    bits = run(backend, rows)[0]
    plain = run(backend, draw((1, 3), dtype))[0]
    assert bool((bits[:width] != plain).all())
    assert all(len(set(column)) == width for column in bits[:width].T.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_sums_alone_do_not_notice(backend: str) -> None:
    """Places exchanged, also of whole blocks; differences that cancel; -0.0."""
    plain = draw((1, 4096), torch.float32).round()
    changed = plain.repeat(6, 1)
    changed[0] = plain.reshape(4, 2, 512).flip(1).flatten()
    changed[1] = plain.reshape(4, 1024)[[1, 0, 2, 3]].flatten()
    changed[2, :2] += torch.tensor([1.0, -1.0])
    changed[3, [5, 1029]] += torch.tensor([1.0, -1.0])
    changed[4] = plain.roll(1)
    changed[5] = torch.where(plain == 0, -0.0, plain)
    bits, moments = run(backend, changed)
    plain_bits, plain_moments = run(backend, plain)
    assert bool((bits != plain_bits).all())
    assert torch.equal(moments[5], plain_moments[0])
    exchanged = [0, 1, 4]
    assert torch.equal(moments[exchanged, :2], plain_moments[:, :2].expand(3, 2))
    assert bool((moments[exchanged, 2] != plain_moments[0, 2]).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_signed_sum_sees_behind_a_layer_norm(backend: str) -> None:
    """Two rows of the same values in another order: the other moments are constants."""
    rows = torch.nn.functional.layer_norm(draw((4, 256), torch.float64), (256,))
    moments = run(backend, rows)[1]
    assert moments[:, 0].abs().max() < 1e-12
    assert moments[:, 1].std() < 0.01
    assert moments[:, 2].std() > 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-24, 1e24])
def test_moments_lose_nothing_to_the_range_of_float32(scale: float, backend: str) -> None:
    rows = (draw((2, 3000), torch.float64) * scale).float()
    moments = run(backend, rows)[1]
    torch.testing.assert_close(moments[:, 1], rows.double().square().sum(1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_sample_stays_alone(bad: float, backend: str) -> None:
    rows = draw((3, 2000), torch.float32)
    clean = run(backend, rows)
    rows[1, 1500] = bad
    bits, moments = run(backend, rows)
    assert not moments[1].isfinite().any()
    assert bool((bits[1] != clean[0][1]).all())
    for found, expected in zip((bits, moments), clean, strict=True):
        assert torch.equal(found[::2], expected[::2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_with_any_number_of_threads(backend: str, threads: None) -> None:
    rows = draw((3, 200_000), torch.float32)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(run(backend, rows))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_a_samples_fingerprint_does_not_depend_on_the_others() -> None:
    rows = draw((5, 3000), torch.float32)
    skip_unless_runs(ops.fingerprint, "cpu", rows)
    for whole, alone in zip(run("cpu", rows), run("cpu", rows[3:4]), strict=True):
        assert torch.equal(whole[3:4], alone)


_ONE_SET = """
import sys
from dpkernels.ops import native
from tests.ops.test_fingerprint import DTYPES, test_the_kernel_equals_the_reference
assert native.load("cpu").instruction_set == sys.argv[1], native.load("cpu")
for dtype in DTYPES:
    test_the_kernel_equals_the_reference((3, 2111), dtype)
"""


@pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
@pytest.mark.parametrize("name", native.instruction_sets())
def test_every_instruction_set(name: str) -> None:
    environ = {**os.environ, "DPKERNELS_INSTRUCTION_SET": name}
    command = [sys.executable, "-c", _ONE_SET, name]
    subprocess.run(command, check=True, env=environ, cwd=ROOT, timeout=120)


def test_the_reference_reads_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = draw((3, 5000), torch.float32)
    whole = reference.fingerprint(rows)
    monkeypatch.setattr(reference, "_PIECE", 1)
    assert_same(reference.fingerprint(rows), whole, rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "every second"])
def test_library_registration(backend: str, layout: str) -> None:
    rows = LAYOUTS[layout](draw((2, 12, 10, 9), torch.float32))
    with ops.use_backend(backend):
        torch.library.opcheck(torch.ops.dpkernels.fingerprint.default, (rows,))


def test_mutation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits that are off by one fail the comparison, and so do moments that are off by 1e-12."""
    skip_unless_runs(ops.fingerprint, "cpu", torch.ones(1, 1))
    honest = cpu.fingerprint
    for bit, factor in ((1, 1.0), (0, 1 + 1e-12)):
        monkeypatch.setattr(
            cpu,
            "fingerprint",
            lambda rows, bit=bit, factor=factor: (honest(rows)[0] + bit, honest(rows)[1] * factor),
        )
        with pytest.raises(AssertionError):
            test_the_kernel_equals_the_reference((3, 1025), torch.float32)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor(1.0), r"^rows: shape \[\]"),
        (torch.ones(2, 3).to_sparse(), r"^rows: layout .*to_dense"),
        (torch.ones(2, 3).to(torch.float8_e5m2), r"^rows: dtype .*float8.*view"),
    ],
)
def test_what_it_cannot_read_is_named(rows: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.fingerprint(rows)
