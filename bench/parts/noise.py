"""The Gaussian noise: throughput, moments, distribution and tails.

A billion draws are added to zeros, chunk by chunk, and compared with the normal law. Beyond six
standard deviations a billion draws are too few: there the generator's transform is given blocks
whose 64-bit radius begins with k zero bits (all others are drawn as usual). By the definition
|z| = sqrt(-2 ln u) |cos(2 pi v)| this samples the event u < 2^-k, outside of which |z| cannot
exceed sqrt(2 k ln 2): P(|z| > t) = 2^-k P(|z| > t | u < 2^-k) for t beyond.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated

import torch
import typer
from scipy import special

from bench import table, work
from bench.part import How, Part, Row, Todo
from bench.table import number
from dpkernels import ops
from dpkernels.ops.noise import NoiseSource, chacha20_blocks_, standard_normals

DRAWS = 1_000_000_000
_CHUNK = 1 << 22
#: the empirical distribution is compared at the edges of these bins
_BINS, _REACH = 1 << 16, 8.0
_TAILS = (3.0, 4.0, 5.0, 5.5, 6.0)
_FAR_TAILS = (5.0, 6.0, 6.5, 7.0, 7.5, 8.0, 8.5, 9.0)
_FAR_BLOCKS = 1 << 19
_RADIUS_BITS = 64


@dataclass(frozen=True)
class Finding:
    """One quantity of the generator.

    Attributes:
        quantity: what was measured.
        draws: on how many normals.
        value: what was found.
        expected: of exact normals.
        deviation: (value - expected) in standard errors; for the distribution, the largest
            distance in units of 1 / sqrt(draws), whose 1 % point is 1.63.
    """

    quantity: str
    draws: int
    value: float
    expected: float | None = None
    deviation: float | None = None


def todo(
    how: How,
    draws: Annotated[int, typer.Option(min=1000, help="Normals.")] = DRAWS,
) -> Todo:
    """Throughput, distribution and far tails."""
    parts: dict[str, Callable[[work.Report], list[Finding]]] = {
        "throughput": lambda report: throughput(),
        "distribution": lambda report: distribution(draws, report),
        "far tails": far_tails,
    }

    def measure(
        find: Callable[[work.Report], list[Finding]], report: work.Report
    ) -> list[list[Row]]:
        return [[asdict(finding) for finding in find(report)]]

    return Todo({name: partial(measure, find) for name, find in parts.items()}, how)


def throughput() -> list[Finding]:
    """Million normals per second of processor time, float32, ours and torch's own."""
    target = torch.zeros(_CHUNK)
    source = NoiseSource()
    calls = {
        "ours, million normals per second": lambda: _add_noise(target, source),
        "torch randn, million normals per second": lambda: target.normal_(),
    }
    rates = dict.fromkeys(calls, 0.0)
    for _ in range(15):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            rates[name] = max(rates[name], 1e-6 * _CHUNK / (time.thread_time() - start))
    return [Finding(name, _CHUNK, rate) for name, rate in rates.items()]


def distribution(draws: int, report: work.Report = work.SILENT) -> list[Finding]:
    """Moments, Kolmogorov-Smirnov distance and tail counts of `draws` normals."""
    powers = torch.zeros(4, dtype=torch.float64)
    bins = torch.zeros(_BINS + 2, dtype=torch.int64)
    beyond = dict.fromkeys(_TAILS, 0)
    largest, seen = 0.0, 0
    for normals in _normals(draws):
        seen += len(normals)
        report("distribution", seen / draws)
        exact, power = normals.double(), torch.ones(len(normals), dtype=torch.float64)
        for order in range(4):
            powers[order] += power.mul_(exact).sum()
        place = normals.mul(_BINS / (2 * _REACH)).add_(_BINS / 2 + 1).floor_()
        bins += torch.bincount(place.clamp_(0, _BINS + 1).long(), minlength=_BINS + 2)
        size = normals.abs()
        for tail in _TAILS:
            beyond[tail] += int((size > tail).sum())
        largest = max(largest, float(size.max()))
    found = [_moment(order, float(powers[order - 1]) / draws, draws) for order in (1, 2, 3, 4)]
    found.append(_distance(bins, draws))
    for tail, count in beyond.items():
        expected = draws * _probability_beyond(tail)
        found.append(
            Finding(
                f"number with |z| > {tail:g}",
                draws,
                float(count),
                expected,
                (count - expected) / math.sqrt(expected),
            )
        )
    found.append(Finding("largest |z|", draws, largest))
    return found


def far_tails(report: work.Report = work.SILENT) -> list[Finding]:
    """P(|z| > t) where no plain sample reaches, by radii that begin with zero bits."""
    found = []
    for index, tail in enumerate(_FAR_TAILS):
        report(f"beyond {tail:g}", index / len(_FAR_TAILS))
        bits = min(int(tail**2 / (2 * math.log(2.0))), _RADIUS_BITS - 1)
        words = torch.empty(_FAR_BLOCKS, 16, dtype=torch.int32)
        key, block = NoiseSource().take(8 * _FAR_BLOCKS)
        chacha20_blocks_(words, key, block)
        low, high = words.view(-1, 4)[:, 0], words.view(-1, 4)[:, 1]
        high.bitwise_and_(_without_leading(min(bits, 32)))
        low.bitwise_and_(_without_leading(max(bits - 32, 0)))
        count = int((standard_normals(words).abs() > tail).sum())
        # A radius has two normals, hardly ever both beyond: the count is binomial over radii.
        radii = 4 * _FAR_BLOCKS
        share = 2.0**bits * 2.0 * _probability_beyond(tail)
        expected = radii * share
        found.append(
            Finding(
                f"P(|z| > {tail:g}), radius below 2^-{bits}",
                8 * _FAR_BLOCKS,
                count / (2.0 * radii) * 2.0**-bits,
                _probability_beyond(tail),
                (count - expected) / math.sqrt(expected * (1.0 - share)),
            )
        )
    return found


def _add_noise(target: torch.Tensor, source: NoiseSource) -> None:
    key, block = source.take(target.numel())
    ops.gaussian_noise_(target, 1.0, key, block)


def _normals(draws: int) -> Iterator[torch.Tensor]:
    source = NoiseSource()
    for begin in range(0, draws, _CHUNK):
        chunk = torch.zeros(min(_CHUNK, draws - begin))
        _add_noise(chunk, source)
        yield chunk


def _moment(order: int, value: float, draws: int) -> Finding:
    """E z^k of a normal is (k - 1)!! for even k; the error's variance is E z^2k - (E z^k)^2."""
    expected = 0.0 if order % 2 else float(special.factorial2(order - 1))
    variance = float(special.factorial2(2 * order - 1)) - expected**2
    error = math.sqrt(variance / draws)
    return Finding(f"mean of z^{order}", draws, value, expected, (value - expected) / error)


def _distance(bins: torch.Tensor, draws: int) -> Finding:
    edges = torch.linspace(-_REACH, _REACH, _BINS + 1, dtype=torch.float64)
    empirical = bins.cumsum(0)[:-1].double() / draws
    largest = float((empirical - special.ndtr(edges)).abs().max())
    name = f"largest distance of the distribution function at {_BINS + 1} points"
    return Finding(name, draws, largest, 0.0, largest * math.sqrt(draws))


def _probability_beyond(tail: float) -> float:
    return float(special.erfc(tail / math.sqrt(2.0)))


def _without_leading(bits: int) -> int:
    """A mask that clears the first `bits` of 32, as int32."""
    mask = (1 << (32 - bits)) - 1
    return mask - (1 << 32) if mask >= 1 << 31 else mask


def digest(rows: list[dict[str, str]]) -> list[str]:
    """Throughput and the largest deviations from the normal law."""
    rates = {r["quantity"]: float(r["value"]) for r in rows if "per second" in r["quantity"]}
    tested = [row for row in rows if number(row["deviation"]) is not None]
    lines = []
    if rates:
        shown = ", ".join(f"{name.partition(',')[0]} {rate:.0f}" for name, rate in rates.items())
        lines.append(
            f"Noise on one thread, million normals per second: {shown}. ({table.provenance(rows)})"
        )
    errors = [row for row in tested if "distance" not in row["quantity"]]
    distances = [row for row in tested if "distance" in row["quantity"]]
    if errors and distances:
        worst = max(errors, key=lambda row: abs(float(row["deviation"])))
        lines.append(
            f"{int(distances[0]['draws']):,} normals: {len(errors)} moments and tails up to "
            f"9 standard deviations differ from the exact law by at most "
            f"{abs(float(worst['deviation'])):.1f} standard errors ({worst['quantity']}); "
            f"Kolmogorov-Smirnov {float(distances[0]['deviation']):.2f} (1 % point 1.63)."
        )
    return lines


PART = Part(
    "noise",
    "Throughput, moments, distribution and tails of the Gaussian noise.",
    ("device", "threads", "quantity"),
    todo,
    seconds=70.0,
    digest=digest,
    headline=True,
)
