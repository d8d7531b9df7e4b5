"""What ran, as data: phases of DP-SGD steps that share a noise multiplier and a sample rate.

Accountants turn these into guarantees; nothing here bounds anything except `coarsen`, whose
rounding is upward (docs/math.md, "Histories").
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dpkernels.accounting.checks import check_count, check_number


@dataclass(frozen=True)
class Phase:
    """`steps` steps of the Poisson-subsampled Gaussian mechanism.

    Attributes:
        noise_multiplier: std of the noise divided by max_grad_norm, > 0; from 1e-15 to 1e15, beyond
            which squares and their sums are no longer exact enough to bound anything.
        sample_rate: probability that a record joins a step, in [0, 1].
        steps: number of steps, an integer >= 1.

    Raises:
        ValueError: if a field is outside its range.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        check_number("noise_multiplier", self.noise_multiplier, above=0.0)
        check_number("noise_multiplier", self.noise_multiplier, at_least=1e-15, at_most=1e15)
        check_number("sample_rate", self.sample_rate, at_least=0.0, at_most=1.0)
        check_count("steps", self.steps)


History = tuple[Phase, ...]


def as_history(phases: Iterable[Phase | tuple[float, float, int]]) -> History:
    """Collects phases; equal (noise_multiplier, sample_rate) merge, rate 0 drops out.

    The order of steps does not matter to any accountant here, so phases that are apart merge too.

    Args:
        phases: `Phase` objects or (noise_multiplier, sample_rate, steps) tuples.

    Returns:
        Phases sorted by noise multiplier, then sample rate. Empty if no step used data.

    Raises:
        ValueError: if a phase is outside its range.
    """
    counts: dict[tuple[float, float], int] = {}
    for item in phases:
        phase = item if isinstance(item, Phase) else Phase(*item)
        if phase.sample_rate > 0:
            key = (float(phase.noise_multiplier), float(phase.sample_rate))
            counts[key] = counts.get(key, 0) + int(phase.steps)
    return tuple(Phase(sigma, rate, steps) for (sigma, rate), steps in sorted(counts.items()))


def coarsen(history: History, limit: int) -> History:
    """Merges near-equal phases until at most `limit` remain; the result dominates the input.

    Lowering the noise multiplier or raising the sample rate can only help a distinguisher, so
    every phase moves to the lower edge (noise) and upper edge (rate) of a geometric bin whose
    width starts at 0.02 % and doubles until few enough phases are left.
    """
    width = 1e-4
    merged = history
    while len(merged) > limit:
        width *= 2
        step = math.log1p(width)
        merged = as_history(
            (
                math.exp(math.floor(math.log(phase.noise_multiplier) / step) * step),
                min(1.0, math.exp(math.ceil(math.log(phase.sample_rate) / step) * step)),
                phase.steps,
            )
            for phase in history
        )
    return merged


def log_absence(history: History) -> float:
    """log of the probability that a record joins no step at all."""
    return sum(
        phase.steps * (math.log1p(-phase.sample_rate) if phase.sample_rate < 1 else -math.inf)
        for phase in history
    )
