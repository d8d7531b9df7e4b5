"""The privacy loss of one step: a law for each adversary (docs/math.md, "One step").

A law knows the hypotheses of one step. Under `null` the record did not join; under `joined` it
did; the step mixes both at the sample rate. Each law is written in units of the noise's std, and
its likelihood ratio rises with one coordinate, so a cell of losses is an interval of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from dpkernels.accounting.events import Phase

Array = NDArray[np.float64]


def _interval_mass(low: Array, high: Array) -> Array:
    """P[low < Z <= high] for a standard normal Z, with relative accuracy in both tails."""
    right = low + high > 0
    first = np.where(right, -high, low)
    return np.maximum(ndtr(np.where(right, -low, high)) - ndtr(first), 0.0)


@lru_cache(maxsize=4)
def _legendre(count: int) -> tuple[Array, Array]:
    return np.polynomial.legendre.leggauss(count)


class StepLaw(ABC):
    """One subsampled step seen by one adversary, as a pair of laws of a real coordinate.

    Attributes:
        phase: the phase the step belongs to.
        rate: sample rate.
        shift: 1 / noise multiplier, the distance between null and joined.
        log_copies: log of how many points x the coordinate stands for.
    """

    log_copies = 0.0

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        self.rate = phase.sample_rate
        self.shift = 1 / phase.noise_multiplier
        self._log_rate = math.log(self.rate)
        self._log_absent = math.log1p(-self.rate) if self.rate < 1 else -math.inf

    @abstractmethod
    def joined_log_ratio(self, coordinate: Array) -> Array:
        """log of the density under `joined` over that under `null`."""

    @abstractmethod
    def coordinate_of(self, joined_log_ratio: Array) -> Array:
        """Inverse of `joined_log_ratio`; the smallest coordinate where there is none."""

    @abstractmethod
    def masses(self, edges: Array) -> tuple[Array, Array]:
        """Masses of the cells between consecutive edges under `null` and under `joined`."""

    @abstractmethod
    def support(self, cut: float) -> tuple[float, float]:
        """Coordinates outside which each law has at most Phi(-cut) a side."""

    def loss(self, coordinate: Array) -> Array:
        """Privacy loss log(1 - q + q * ratio)."""
        return np.logaddexp(self._log_absent, self._log_rate + self.joined_log_ratio(coordinate))

    def log_mixture(self, coordinate: Array) -> Array:
        """log of the density of the step's mixture of both hypotheses."""
        log_null = -0.5 * coordinate * coordinate - 0.5 * math.log(2 * math.pi) + self.log_copies
        return log_null + self.loss(coordinate)

    def edges(self, losses: Array) -> Array:
        """Coordinates whose losses are `losses`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            inner = np.log(-np.expm1(np.minimum(self._log_absent - losses, 0.0)))
        return self.coordinate_of(losses - self._log_rate + inner)

    def nodes(self, cut: float) -> tuple[Array, Array]:
        """Quadrature of the step under the mixture over `support`: losses and log weights."""
        points, weights = _legendre(256)
        low, high = self.support(cut)
        panels = np.linspace(low, high, 2 + min(40, math.ceil(self.shift / (2 * cut))))
        half = (panels[1] - panels[0]) / 2
        x = (panels[:-1, None] + half * (1 + points)).ravel()
        log_weights = self.log_mixture(x) + np.tile(np.log(half * weights), panels.size - 1)
        return self.loss(x), log_weights


class WorstCase(StepLaw):
    """Null N(0, 1), joined N(1 / sigma, 1): the adversary knows the record's direction."""

    def joined_log_ratio(self, coordinate: Array) -> Array:
        return self.shift * (coordinate - self.shift / 2)

    def coordinate_of(self, joined_log_ratio: Array) -> Array:
        return joined_log_ratio / self.shift + self.shift / 2

    def masses(self, edges: Array) -> tuple[Array, Array]:
        null = _interval_mass(edges[:-1], edges[1:])
        moved = edges - self.shift
        return null, _interval_mass(moved[:-1], moved[1:])

    def support(self, cut: float) -> tuple[float, float]:
        return -cut, cut + self.shift


class Relaxed(StepLaw):
    """Null N(0, 1), joined N(+-1 / sigma, 1): the sign is unknown, so |x| is all that counts."""

    log_copies = math.log(2)

    def joined_log_ratio(self, coordinate: Array) -> Array:
        size = self.shift * np.abs(coordinate)
        return size + np.log1p(np.exp(-2 * size)) - math.log(2) - self.shift**2 / 2

    def coordinate_of(self, joined_log_ratio: Array) -> Array:
        log_cosh = np.maximum(joined_log_ratio + self.shift**2 / 2, 0.0)
        growth = np.log1p(np.sqrt(-np.expm1(-2 * log_cosh)))
        return (log_cosh + growth) / self.shift

    def masses(self, edges: Array) -> tuple[Array, Array]:
        null = 2 * _interval_mass(edges[:-1], edges[1:])
        near, far = edges - self.shift, edges + self.shift
        return null, _interval_mass(near[:-1], near[1:]) + _interval_mass(far[:-1], far[1:])

    def support(self, cut: float) -> tuple[float, float]:
        return 0.0, cut + self.shift


ADVERSARIES: dict[str, type[StepLaw]] = {"worst_case": WorstCase, "relaxed": Relaxed}


def step_laws(history: tuple[Phase, ...], adversary: str) -> list[StepLaw]:
    """One law per phase.

    Raises:
        ValueError: if the adversary is not known.
    """
    if adversary not in ADVERSARIES:
        raise ValueError(f"adversary={adversary!r}: expected one of {sorted(ADVERSARIES)}")
    return [ADVERSARIES[adversary](phase) for phase in history]
