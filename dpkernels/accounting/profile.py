"""delta(epsilon) of a history by discretised composition, in both directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq

from dpkernels.accounting import gaussian
from dpkernels.accounting.composition import Composition, TiltedSum
from dpkernels.accounting.events import History, log_absence
from dpkernels.accounting.losses import step_laws

FINE = 2e-4
"""Relative excess of epsilon that the discretisation aims at."""

COARSE = 4e-3
"""The same for a first look."""


@dataclass(frozen=True)
class _Plan:
    """Where the sum has to be looked at: estimates that choose a grid and prove nothing.

    Attributes:
        epsilon: the epsilon of interest.
        log_delta: log delta expected there.
        tilt: saddle point.
        slope: -d log_delta / d epsilon expected there, at least the tilt.
    """

    epsilon: float
    log_delta: float
    tilt: float
    slope: float


class Profile:
    """delta(epsilon) of a history by discretised composition, both directions."""

    def __init__(self, history: History, log_delta: float) -> None:
        self.history = history
        self.composition = Composition(step_laws(history, "worst_case"), log_delta - math.log(1e8))
        self.add_limit = -log_absence(history)

    def _saddles(self, tilts: np.ndarray, reverse: bool) -> tuple[np.ndarray, np.ndarray]:
        """(epsilon, estimated log delta) at which each tilt is the saddle point."""
        log_mgf, mean, spread = self.composition.cumulants(-1 - tilts if reverse else tilts)
        mean = -mean if reverse else mean
        epsilon = mean - 1 / tilts - 1 / (1 + tilts)
        width = spread + 1 / tilts**2 + 1 / (1 + tilts) ** 2
        log_delta = (
            log_mgf
            - tilts * epsilon
            - np.log(tilts)
            - np.log1p(tilts)
            - 0.5 * np.log(2 * math.pi * width)
        )
        return epsilon, log_delta

    def _one_step(self, epsilons: np.ndarray) -> np.ndarray:
        """log of the summed single-step deltas: what rules where steps rarely matter twice."""
        terms = [
            math.log(phase.steps * phase.sample_rate)
            + gaussian.log_delta(
                epsilons
                - math.log(phase.sample_rate)
                + np.log1p(-(1 - phase.sample_rate) * np.exp(-epsilons)),
                1 / phase.noise_multiplier,
            )
            for phase in self.history
        ]
        return np.logaddexp.reduce(terms, axis=0)

    def _grid(self) -> np.ndarray:
        scale = max(abs(self.composition.max_loss), abs(self.composition.min_loss))
        return np.exp(math.log(1e-4 / scale) + np.linspace(0.0, 50.0, 64))

    def _saddle(
        self, reaches: Callable[[np.ndarray, np.ndarray], np.ndarray], reverse: bool
    ) -> tuple[float, float, float]:
        """The smallest tilt whose (epsilon, log delta) `reaches` the goal, with that pair."""
        tilts = self._grid()
        for _ in range(3):
            reached = np.flatnonzero(reaches(*self._saddles(tilts, reverse)))
            first = max(int(reached[0]) if reached.size else tilts.size - 1, 1)
            tilts = np.geomspace(tilts[first - 1], tilts[first], 12)
        epsilon, log_delta = self._saddles(tilts[-1:], reverse)
        return float(tilts[-1]), float(epsilon[0]), float(log_delta[0])

    def at_epsilon(self, epsilon: float, reverse: bool) -> _Plan:
        """The plan for a given epsilon."""
        tilt, _, log_delta = self._saddle(lambda e, _: e >= epsilon, reverse)
        if not reverse:
            near, far = self._one_step(np.array([epsilon, epsilon * (1 + 1e-4)]))
            if near > log_delta:
                return _Plan(epsilon, float(near), tilt, max(tilt, (near - far) / epsilon * 1e4))
        return _Plan(epsilon, log_delta, tilt, tilt)

    def at_delta(self, log_delta: float, reverse: bool) -> _Plan:
        """The plan for a given log delta."""
        _, epsilon, _ = self._saddle(lambda _, value: value <= log_delta, reverse)
        if not reverse:
            epsilons = np.geomspace(1e-6, 1e17, 240)
            likely = np.flatnonzero(self._one_step(epsilons) >= log_delta)
            if likely.size:
                epsilon = max(epsilon, float(epsilons[likely[-1]]))
        return self.at_epsilon(max(epsilon, 1e-6), reverse)

    def _compose(
        self, plan: _Plan, log_delta: float, reverse: bool, tolerance: float = FINE
    ) -> TiltedSum:
        """Composes at the tilt, at most the saddle point, whose window is the narrowest.

        Where one step can dwarf the others, the law tilted to the saddle point has far tails; a
        smaller tilt has a narrower window and pays with rounding noise, which is kept harmless.
        """
        rates = plan.tilt * np.array([1.0, 0.85, 0.7, 0.55, 0.4, 0.25])
        tilts = -1 - rates if reverse else rates
        excess = self.composition.cumulants(tilts)[0] - rates * plan.epsilon - log_delta
        excess = np.maximum(excess, 0.0)
        quiet = excess <= max(excess[0], math.log(1e-3 / self.composition.rounding))
        spacing = math.sqrt(
            12 * tolerance * plan.epsilon / (self.composition.steps * (1 + plan.slope))
        )
        windows = [
            self.composition.window(tilt, spacing, min(extra + 16.0, 60.0))
            for tilt, extra in zip(tilts[quiet], excess[quiet], strict=True)
        ]
        return self.composition.compose(min(windows, key=lambda window: window.width), spacing)

    def _bound(self, total: TiltedSum, epsilon: float, reverse: bool) -> float:
        return float(
            np.logaddexp(total.log_delta(epsilon, reverse=reverse), self.composition.log_cut)
        )

    def _add_is_negligible(self, epsilon: float, log_delta: float) -> bool:
        """Whether the add direction is below half of delta by its Chernoff bound."""
        if epsilon >= self.add_limit:
            return True
        tilts = self._grid()
        log_mgf = self.composition.cumulants(-1 - tilts)[0]
        chernoff = log_mgf - tilts * epsilon + tilts * np.log(tilts) - (1 + tilts) * np.log1p(tilts)
        return bool(chernoff.min() < log_delta - math.log(2))

    def log_delta(self, epsilon: float) -> float:
        """log of an upper bound on delta at epsilon > 0."""
        bound = self._directed_log_delta(epsilon, False)
        if not self._add_is_negligible(epsilon, bound):
            bound = max(bound, self._directed_log_delta(epsilon, True))
        return bound

    def _directed_log_delta(self, epsilon: float, reverse: bool) -> float:
        plan = self.at_epsilon(epsilon, reverse)
        total = self._compose(plan, plan.log_delta, reverse)
        return self._bound(total, epsilon, reverse)

    def epsilon(self, log_delta: float, tolerance: float = FINE) -> float:
        """An upper bound on epsilon at the given log delta, about `tolerance` above the exact."""
        epsilon = self._directed_epsilon(log_delta, False, tolerance)
        if not self._add_is_negligible(epsilon, log_delta):
            epsilon = max(epsilon, self._directed_epsilon(log_delta, True, tolerance))
        return epsilon

    def _directed_epsilon(self, log_delta: float, reverse: bool, tolerance: float) -> float:
        """Looks coarsely until it knows where epsilon is and how delta falls there, then finely."""
        floor = 1e-12 * abs(self.composition.max_loss)
        plan = self.at_delta(log_delta, reverse)
        current = COARSE
        for _ in range(8):
            total = self._compose(plan, log_delta, reverse, current)
            epsilon = self._invert(total, log_delta, plan.epsilon, reverse)
            move = max(1e-3 * epsilon, total.losses[1] - total.losses[0])
            fall = self._bound(total, epsilon, reverse) - self._bound(
                total, epsilon + move, reverse
            )
            settled = (
                0.7 * plan.epsilon <= max(epsilon, floor) <= 1.4 * plan.epsilon
                and fall <= 2 * plan.slope * move
            )
            if settled and current == tolerance:
                break
            current = tolerance if settled else current
            plan = self.at_epsilon(max(epsilon, floor), reverse)
            plan = replace(plan, slope=max(plan.slope, fall / move))
        return epsilon

    def _invert(self, total: TiltedSum, log_delta: float, guess: float, reverse: bool) -> float:
        def gap(epsilon: float) -> float:
            return self._bound(total, epsilon, reverse) - log_delta

        if gap(0.0) <= 0:
            return 0.0
        low, high = 0.0, guess
        while gap(high) > 0:
            low, high = high, high * 1.5
            if high > 10 * max(self.composition.max_loss, guess):
                return math.inf
        return brentq(gap, low, high, xtol=1e-9 * high, rtol=1e-9)
