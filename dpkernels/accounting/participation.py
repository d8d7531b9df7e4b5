"""Small noise: every step shows whether the record joined, so the loss is a binomial mixture.

Upper and lower bounds on delta for one (noise_multiplier, sample_rate, steps); the caller accepts
the upper bound where the lower one certifies it (docs/math.md, "Participation mixture").
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaln, log_ndtr, logsumexp, rel_entr

from dpkernels.accounting import gaussian
from dpkernels.accounting.events import History

_ETAS = 10.0 ** np.arange(-10, -4)
_CELLS = 1 << 13


def _window(steps: int, rate: float, log_tail: float) -> tuple[int, int]:
    """Counts [low, high] outside which Bin(steps, rate) has at most exp(log_tail) a side."""

    def chernoff(count: int) -> float:
        share = count / steps
        return -steps * float(rel_entr(share, rate) + rel_entr(1 - share, 1 - rate))

    def outermost(inside: int, edge: int) -> int:
        if chernoff(edge) > log_tail:
            return edge
        while abs(edge - inside) > 1:
            middle = (edge + inside) // 2
            if chernoff(middle) > log_tail:
                inside = middle
            else:
                edge = middle
        return edge

    mean = min(steps, max(0, round(steps * rate)))
    return outermost(mean, 0), outermost(mean, steps)


def log_binomial(steps: int, rate: float, counts: np.ndarray) -> np.ndarray:
    """log P[Bin(steps, rate) = counts] for 0 < rate < 1."""
    return (
        gammaln(steps + 1.0)
        - gammaln(counts + 1.0)
        - gammaln(steps - counts + 1.0)
        + counts * math.log(rate)
        + (steps - counts) * math.log1p(-rate)
    )


class ParticipationMixture:
    """Bounds on delta at one sample rate 0 < q < 1, for any noise multiplier.

    Args:
        sample_rate: q.
        steps: T.
        log_delta: log of the delta of interest; sets where the binomial may be cut.
    """

    def __init__(self, sample_rate: float, steps: int, log_delta: float) -> None:
        self.sample_rate = sample_rate
        self.steps = steps
        self.log_delta = log_delta
        self._log_cut = log_delta - math.log(1e10)
        low, high = _window(steps, sample_rate, self._log_cut)
        self.counts = np.arange(low, high + 1, dtype=np.float64)
        self._log_mass = log_binomial(steps, sample_rate, self.counts)
        self._log_odds = math.log1p(-sample_rate) - math.log(sample_rate)
        self._shift = self.counts * self._log_odds - steps * math.log1p(-sample_rate)
        self.log_saturation = math.log(-math.expm1(steps * math.log1p(-sample_rate)))

    def _mixture(self, epsilons: np.ndarray | float, noise_multiplier: float) -> float:
        each = gaussian.log_delta(epsilons, np.sqrt(self.counts) / noise_multiplier)
        return float(logsumexp(self._log_mass + each))

    def lower(self, epsilon: float, noise_multiplier: float) -> float:
        """log of a lower bound on delta (remove direction)."""
        return self._mixture(epsilon + self._shift, noise_multiplier)

    def upper(self, epsilon: float, noise_multiplier: float) -> float:
        """log of an upper bound on delta, both directions, at epsilon >= 0."""
        remove = self._mixture(epsilon, noise_multiplier)
        eta, log_bad = self._excess(epsilon, noise_multiplier)
        if eta is not None:
            refined = self._mixture(epsilon - self.steps * eta + self._shift, noise_multiplier)
            remove = min(remove, max(float(np.logaddexp(refined, log_bad)), self._log_add(epsilon)))
        return min(float(np.logaddexp(remove, self._log_cut + math.log(2))), self.log_saturation)

    def _log_add(self, epsilon: float) -> float:
        """log of an upper bound in the add direction: a step's loss is below -log(1 - q)."""
        exponent = epsilon + self.steps * math.log1p(-self.sample_rate)
        return math.log(-math.expm1(exponent)) if exponent < 0 else -math.inf

    def _excess(self, epsilon: float, noise_multiplier: float) -> tuple[float | None, float]:
        """The smallest eta that a step's loss exceeds its limit by with negligible probability.

        Returns:
            (eta, log of the probability that any step exceeds it); eta None if none is negligible.
        """
        etas = _ETAS * (epsilon / self.steps)
        log_expm1 = etas + np.log(-np.expm1(-etas))
        half = 1 / (2 * noise_multiplier)
        joined = log_ndtr(noise_multiplier * (self._log_odds - log_expm1) - half)
        absent = log_ndtr(-noise_multiplier * (self._log_odds + log_expm1) - half)
        log_bad = math.log(self.steps) + np.logaddexp(
            math.log(self.sample_rate) + joined, math.log1p(-self.sample_rate) + absent
        )
        negligible = np.flatnonzero(log_bad <= self.log_delta - math.log(1e6))
        if not negligible.size:
            return None, 0.0
        first = int(negligible[0])
        return float(etas[first]), float(log_bad[first])


def revealed_epsilon(history: History, log_delta: float, ceiling: float) -> tuple[float, bool]:
    """An upper bound on epsilon where the attacker learns all participations of several phases.

    The separation squared is the sum over phases of participations / noise_multiplier^2, rounded
    up to a grid; revealing and rounding up can only raise delta. Concealing the participations
    again takes at most `concealed` off any loss, hence off epsilon, which certifies the bound where
    that is little.

    Args:
        history: phases, at most a few dozen.
        log_delta: log of delta; sets where the binomials may be cut.
        ceiling: any upper bound on epsilon.

    Returns:
        The bound, and whether it is within about 0.1 % of the exact epsilon.
    """
    log_cut = log_delta - math.log(1e10)
    log_side = log_cut - math.log(2 * len(history))
    windows = [
        (p.steps, p.steps) if p.sample_rate == 1 else _window(p.steps, p.sample_rate, log_side)
        for p in history
    ]
    largest = sum(
        high / p.noise_multiplier**2 for (_, high), p in zip(windows, history, strict=True)
    )
    step = largest / _CELLS
    mass = np.ones(1)
    offset = 0
    concealed = 0.0
    for (low, high), phase in zip(windows, history, strict=True):
        counts = np.arange(low, high + 1, dtype=np.float64)
        cells = np.ceil(counts / (phase.noise_multiplier**2 * step)).astype(np.int64)
        chances = np.ones(1)
        if phase.sample_rate < 1:
            chances = np.exp(log_binomial(phase.steps, phase.sample_rate, counts))
            concealed -= high * math.log(phase.sample_rate)
            concealed -= (phase.steps - low) * math.log1p(-phase.sample_rate)
        mass = np.convolve(mass, np.bincount(cells - cells[0], weights=chances))
        offset += int(cells[0])
    kept = mass > 0
    separations = np.sqrt((offset + np.flatnonzero(kept)) * step)
    log_mass = np.log(mass[kept])

    def gap(log_epsilon: float) -> float:
        each = gaussian.log_delta(math.exp(log_epsilon), separations)
        bound = np.logaddexp(logsumexp(log_mass + each), log_cut)
        return float(bound) - log_delta

    most = math.log(ceiling)
    least = most - 1.0
    while gap(least) <= 0 and least > most - 60:
        least -= 2.0
    if gap(most) >= 0 or gap(least) <= 0:
        return ceiling, False
    epsilon = math.exp(brentq(gap, least, most, xtol=1e-10))
    return epsilon, concealed <= 1e-3 * epsilon
