"""Integer noise: the table, the theorems it rests on, and the sampler against the exact law."""

from __future__ import annotations

import bisect
import functools
import itertools

import mpmath
import numpy as np
import pytest
import torch

from dpkernels.ops import native
from dpkernels.ops.noise import (
    NoiseSource,
    chacha20_blocks_,
    discrete_gaussian_noise_,
    discrete_gaussians,
    gaussian_noise_,
    table,
)
from dpkernels.ops.registry import use_backend

DIGITS = 60
STD = table.VARIANCE**0.5
KEY = torch.tensor([1, 2, 3, 4])


@pytest.fixture(autouse=True)
def precise() -> None:
    mpmath.mp.dps = DIGITS


def weight(x: object, variance: object) -> mpmath.mpf:
    return mpmath.exp(-(mpmath.mpf(x) ** 2) / (2 * mpmath.mpf(variance)))


@functools.cache
def normaliser(variance: int) -> mpmath.mpf:
    """sum over integers of the weight: theta function, by Poisson summation for wide ones."""
    harmonics = sum(mpmath.exp(-2 * mpmath.pi**2 * k**2 * variance) for k in range(1, 4))
    return mpmath.sqrt(2 * mpmath.pi * variance) * (1 + 2 * harmonics)


def integer_thresholds() -> list[int]:
    return [(int(high) << 64) | int(low) for high, low in table.thresholds()[: 2 * table.LIMIT]]


def test_the_table_is_the_discrete_gaussian() -> None:
    """Total variation of one level, summed exactly, the tails that are cut included."""
    exact = [
        weight(j, table.LEVEL_STD**2) / normaliser(table.LEVEL_STD**2)
        for j in range(-table.LIMIT, table.LIMIT + 1)
    ]
    ends = [0, *integer_thresholds(), 2**128]
    drawn = [mpmath.mpf(b - a) / mpmath.mpf(2) ** 128 for a, b in itertools.pairwise(ends)]
    assert all(b > a for a, b in itertools.pairwise(ends))
    beyond = 1 - mpmath.fsum(exact)
    variation = (mpmath.fsum(abs(a - b) for a, b in zip(exact, drawn, strict=True)) + beyond) / 2
    assert table.LEVELS * variation < table.STATISTICAL_DISTANCE / 10


@pytest.mark.parametrize("level", [1, 2, 3])
def test_levels_add_up_to_a_wider_discrete_gaussian(level: int) -> None:
    """What one level adds: the exact convolution, at values near and far, all residues alike."""
    radix, narrow = table.RADIX**level, table.LEVEL_STD**2
    below = narrow * sum(table.RADIX ** (2 * i) for i in range(level))
    whole = below + narrow * radix**2
    worst = mpmath.mpf(0)
    for n in (0, 1, radix // 3, radix // 2, radix + 1, 5 * radix * table.LEVEL_STD // 2 + 7):
        peak = n * radix * narrow // whole
        convolved = mpmath.fsum(
            weight(j, narrow) * weight(n - radix * j, below) for j in range(peak - 60, peak + 61)
        ) / (normaliser(narrow) * normaliser(below))
        worst = max(worst, abs(convolved / (weight(n, whole) / normaliser(whole)) - 1))
    assert worst < table.STATISTICAL_DISTANCE / 2


def test_a_discrete_gaussian_is_a_rounded_continuous_one() -> None:
    """Randomised rounding of width 2 has a normaliser that does not depend on where it starts."""
    sums = [
        mpmath.fsum(weight(x - mpmath.mpf(start) / 16, 4) for x in range(-60, 61))
        for start in range(17)
    ]
    assert max(sums) / min(sums) - 1 < table.STATISTICAL_DISTANCE


def words_of(numbers: list[list[int]]) -> torch.Tensor:
    """[blocks, 16] int32 from four 128-bit numbers a block."""
    halves = [[half for u in row for half in (u % 2**64, u >> 64)] for row in numbers]
    return torch.from_numpy(np.array(halves, dtype="<u8").view("<i4"))


BACKENDS = [
    "reference",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def test_values_are_those_of_a_plain_search() -> None:
    """At thresholds, one below, one above, at both ends, and at random numbers."""
    edges = integer_thresholds()
    chosen = [edges[i] for i in (0, 1, 2, 700, 1639, 1640, 1641, 3000, 3278, 3279)]
    special = [0, 1, 2**64 - 1, 2**64, 2**127, 2**128 - 1, *chosen]
    special += [u + 1 for u in chosen] + [u - 1 for u in chosen]
    random = np.random.default_rng(0)
    special += [int.from_bytes(random.bytes(16), "little") for _ in range(200)]
    numbers = [
        [special[(i * stride) % len(special)] for stride in (1, 3, 7, 11)]
        for i in range(len(special))
    ]
    expected = [
        sum(
            table.RADIX**level * (bisect.bisect_right(edges, u) - table.LIMIT)
            for level, u in enumerate(row)
        )
        for row in numbers
    ]
    assert discrete_gaussians(words_of(numbers)).tolist() == expected


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    return discrete_gaussian_noise_(torch.zeros(2**20, dtype=torch.int64), KEY, 0)


def test_moments(sample: torch.Tensor) -> None:
    x = sample.double() / STD
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        mean = float(x.pow(power).mean())
        assert abs(mean - moment) < 5 * (variance / len(x)) ** 0.5, power


def chi_squared(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Standard deviations of the statistic above its mean."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


def test_bulk(sample: torch.Tensor) -> None:
    """1000 cells of equal probability; a step is 3e-8 of the deviation, far below a cell."""
    cells = torch.histc(torch.special.ndtr(sample.double() / STD), bins=1000, min=0, max=1)
    assert abs(chi_squared(cells, torch.full((1000,), len(sample) / 1000))) < 5


@pytest.mark.parametrize("modulus", [2, 64, 1000])
def test_low_digits_are_uniform(sample: torch.Tensor, modulus: int) -> None:
    """A discrete Gaussian this wide leaves every residue alike: what floats give away."""
    counts = torch.bincount(sample % modulus, minlength=modulus).double()
    expected = torch.full((modulus,), len(sample) / modulus, dtype=torch.float64)
    assert abs(chi_squared(counts, expected)) < 5


@pytest.mark.parametrize("level", range(table.LEVELS))
def test_one_level_follows_the_exact_probabilities(level: int) -> None:
    """The other levels are held at 0, the median; chi-squared over single integers."""
    count = 2**18
    words = chacha20_blocks_(torch.empty(count, 16, dtype=torch.int32), KEY, 7)
    held = words_of([[2**127] * table.LEVELS]).expand(count, 16).clone()
    held[:, 4 * level : 4 * level + 4] = words[:, 4 * level : 4 * level + 4]
    values = discrete_gaussians(held)
    assert (values % table.RADIX**level == 0).all()
    values = values // table.RADIX**level
    probabilities = torch.tensor([float(p) for p in table.level_probabilities()])
    inner = slice(table.LIMIT - 300, table.LIMIT + 301)
    counts = torch.bincount(values + table.LIMIT, minlength=2 * table.LIMIT + 1)[inner].double()
    expected = count * probabilities[inner].double()
    inside = torch.cat([counts, count - counts.sum().reshape(1)])
    assert abs(chi_squared(inside, torch.cat([expected, count - expected.sum().reshape(1)]))) < 5


def test_elements_take_a_block_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is drawn at a time, and added to what is there."""
    start = torch.arange(60).reshape(3, 20)
    whole = discrete_gaussian_noise_(start.clone(), KEY, 2**32 - 20)
    monkeypatch.setattr("dpkernels.ops.noise._INTEGERS_AT_A_TIME", 7)
    assert torch.equal(discrete_gaussian_noise_(start.clone(), KEY, 2**32 - 20), whole)
    late = discrete_gaussian_noise_(torch.zeros(40, dtype=torch.int64), KEY, 2**32)
    assert torch.equal(whole.flatten()[20:] - torch.arange(20, 60), late)


def test_blocks_are_reserved_one_for_a_value() -> None:
    source = NoiseSource()
    first = source.take_blocks(10)
    second = source.take_blocks(1)
    assert (first[1], second[1], source.take(8)[1]) == (0, 10, 11)


def test_independent_of_floating_noise_and_of_neighbours(sample: torch.Tensor) -> None:
    x = sample.double() / STD
    floating = gaussian_noise_(torch.zeros(len(x)), 1.0, KEY, 0).double()
    for other in (x.roll(1), x.roll(4), floating):
        assert abs(float((x * other).mean())) < 5 / len(x) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_on_every_backend(backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    with use_backend("reference"):
        expected = discrete_gaussian_noise_(torch.zeros(1001, dtype=torch.int64), KEY, 2**40)
    with use_backend("auto" if backend != "reference" else backend):
        found = discrete_gaussian_noise_(
            torch.zeros(1001, dtype=torch.int64, device=device), KEY, 2**40
        )
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("tensor", [torch.zeros(4), torch.zeros(4, 2, dtype=torch.int64).T])
def test_only_contiguous_integers(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="tensor: .*expected contiguous int64"):
        discrete_gaussian_noise_(tensor, KEY, 0)
