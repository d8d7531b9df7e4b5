"""The tight accountant: upper bounds on delta, epsilon and the noise that a budget needs.

Three regimes, each an upper bound with a relative error far below 1 %:
full batch (exact), participation mixture (small noise), discretised composition (the rest).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy.optimize import brentq

from dpkernels.accounting import gaussian
from dpkernels.accounting.composition import Composition, TiltedSum
from dpkernels.accounting.events import History, Phase, coarsen, log_absence
from dpkernels.accounting.losses import step_laws
from dpkernels.accounting.participation import ParticipationMixture

_FINE = 2e-4
_COARSE = 4e-3
_ROUND_UP = 1e-4
_SOLVER = 1e-7
_MAX_PHASES = 32
_MIXTURE_GAP = 1e-3
_MIXTURE_SIGMA = 0.3
_MIN_LOG_DELTA = -600.0


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

    def _saddle(self, reaches: Callable[[np.ndarray, np.ndarray], np.ndarray], reverse: bool):
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
        self, plan: _Plan, log_delta: float, reverse: bool, tolerance: float = _FINE
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

    def epsilon(self, log_delta: float, tolerance: float = _FINE) -> float:
        """An upper bound on epsilon at the given log delta, about `tolerance` above the exact."""
        epsilon = self._directed_epsilon(log_delta, False, tolerance)
        if not self._add_is_negligible(epsilon, log_delta):
            epsilon = max(epsilon, self._directed_epsilon(log_delta, True, tolerance))
        return epsilon

    def _directed_epsilon(self, log_delta: float, reverse: bool, tolerance: float) -> float:
        """Looks coarsely until it knows where epsilon is and how delta falls there, then finely."""
        floor = 1e-12 * abs(self.composition.max_loss)
        plan = self.at_delta(log_delta, reverse)
        current = _COARSE
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


def log_saturation(history: History) -> float:
    """log of the probability that the record joins any step: delta never exceeds it."""
    log_absent = log_absence(history)
    return math.log(-math.expm1(log_absent)) if log_absent < 0 else -math.inf


def _separation(history: History) -> float:
    """mu of the Gaussian that dominates the history: as if every record joined every step."""
    return math.sqrt(sum(phase.steps / phase.noise_multiplier**2 for phase in history))


def _mixture_epsilon(phase: Phase, log_delta: float, ceiling: float) -> float | None:
    """Epsilon by the participation mixture where its lower bound certifies it, else None."""
    mixture = ParticipationMixture(phase.sample_rate, phase.steps, log_delta)
    sigma = phase.noise_multiplier

    def gap(log_epsilon: float) -> float:
        return mixture.upper(math.exp(log_epsilon), sigma) - log_delta

    high = math.log(ceiling)
    if gap(high) > 0:
        return None
    low = high - 1.0
    while gap(low) <= 0:
        high, low = low, low - 2 * (high - low)
        if low < math.log(ceiling) - 60:
            return None
    epsilon = math.exp(brentq(gap, low, high, xtol=1e-10))
    certified = mixture.lower(epsilon / (1 + _MIXTURE_GAP), sigma) >= log_delta
    return epsilon if certified else None


def epsilon(history: History, delta: float, tolerance: float = _FINE) -> float:
    """An upper bound on epsilon at `delta` for what ran, under add/remove neighbours.

    Args:
        history: phases as `events.as_history` returns them.
        delta: in (0, 1).
        tolerance: relative excess that the discretisation aims at.

    Returns:
        Epsilon >= 0, by default at most about 0.1 % above the exact value.
    """
    log_delta = math.log(delta)
    if not history or log_delta >= log_saturation(history):
        return 0.0
    full_batch = gaussian.epsilon(_separation(history), log_delta)
    if all(phase.sample_rate == 1 for phase in history):
        return full_batch * (1 + _ROUND_UP)
    if full_batch == 0.0:
        return 0.0
    if len(history) == 1 and history[0].noise_multiplier < _MIXTURE_SIGMA:
        bound = _mixture_epsilon(history[0], log_delta, full_batch * (1 + _SOLVER))
        if bound is not None:
            return bound * (1 + _ROUND_UP)
    composed = Profile(coarsen(history, _MAX_PHASES), log_delta).epsilon(log_delta, tolerance)
    return min(composed, full_batch) * (1 + _ROUND_UP)


def log_delta(history: History, epsilon: float) -> float:
    """log of an upper bound on delta at epsilon > 0 for what ran."""
    if not history:
        return -math.inf
    full_batch = float(gaussian.log_delta(epsilon, _separation(history)))
    if all(phase.sample_rate == 1 for phase in history):
        return full_batch
    ceiling = min(full_batch, log_saturation(history))
    if ceiling < _MIN_LOG_DELTA:
        return ceiling
    guess = ceiling
    for _ in range(3):
        bound = Profile(coarsen(history, _MAX_PHASES), guess).log_delta(epsilon)
        if len(history) == 1:
            phase = history[0]
            mixture = ParticipationMixture(phase.sample_rate, phase.steps, guess)
            bound = min(bound, mixture.upper(epsilon, phase.noise_multiplier))
        if bound > guess - 5:
            break
        guess = bound
    return min(bound, ceiling)


def _mixture_noise(
    target: float, log_delta: float, rate: float, steps: int, full_batch: float
) -> float | None:
    """Noise multiplier by the participation mixture where it is certified, else None."""
    mixture = ParticipationMixture(rate, steps, log_delta)

    def gap(log_sigma: float) -> float:
        return mixture.upper(target, math.exp(log_sigma)) - log_delta

    high = math.log(min(full_batch * (1 + _SOLVER), _MIXTURE_SIGMA))
    if gap(high) > 0:
        return None
    low = high - 1.0
    while gap(low) <= 0:
        high, low = low, low - 2 * (high - low)
    sigma = math.exp(brentq(gap, low, high, xtol=1e-10))
    certified = mixture.lower(target, sigma / (1 + _MIXTURE_GAP)) >= log_delta
    return sigma if certified else None


def _estimated_noise(
    target: float, log_delta: float, rate: float, steps: int, full_batch: float
) -> float:
    """Where to start looking: the noise at which the saddle-point estimate meets delta."""

    def gap(log_sigma: float) -> float:
        phase = Phase(math.exp(log_sigma), rate, steps)
        return Profile((phase,), log_delta).at_epsilon(target, False).log_delta - log_delta

    high = math.log(full_batch)
    low = high - 1.0
    while gap(low) < 0 and low > high - 40:
        high, low = low, low - 1.0
    return math.exp(brentq(gap, low, high, xtol=1e-4)) if gap(high) < 0 < gap(low) else full_batch


def noise_multiplier(target: float, delta: float, rate: float, steps: int) -> float:
    """The smallest noise multiplier, to about 0.1 % and from above, that keeps the budget.

    `epsilon` of the returned noise is never above the target.

    Args:
        target: epsilon > 0.
        delta: in (0, 1).
        rate: sample rate, in (0, 1].
        steps: number of steps.

    Raises:
        ValueError: if delta is so large that no noise is needed to meet it.
    """
    log_delta = math.log(delta)
    saturation = log_saturation((Phase(1.0, rate, steps),))
    if log_delta >= saturation:
        raise ValueError(
            f"target_delta={delta!r}: with sample_rate={rate!r} and steps={steps!r} a record joins "
            f"any step with probability {math.exp(saturation):g} only, so that no noise at all "
            "would meet this delta; expected a target_delta below that probability"
        )
    margin = 1 + _SOLVER
    target = target / (1 + _ROUND_UP)
    full_batch = math.sqrt(steps) / gaussian.calibrate_mu(target, log_delta)
    if rate == 1:
        return full_batch * margin
    sigma = _mixture_noise(target, log_delta, rate, steps, full_batch)
    if sigma is not None:
        return sigma * margin

    def excess(log_sigma: float, tolerance: float) -> float:
        spent = epsilon((Phase(math.exp(log_sigma), rate, steps),), delta, tolerance)
        spent /= 1 + _ROUND_UP
        return math.log(spent / target) if spent > 0 else -math.inf

    start = math.log(_estimated_noise(target, log_delta, rate, steps, full_batch))
    ceiling = math.log(full_batch * margin)
    near, slope = _smallest_sufficient(partial(excess, tolerance=_COARSE), start, ceiling, 4e-3)
    log_sigma, _ = _smallest_sufficient(
        partial(excess, tolerance=_FINE), near - _COARSE / slope, ceiling, 5e-4, slope
    )
    return math.exp(log_sigma)


def _smallest_sufficient(
    excess: Callable[[float], float],
    start: float,
    ceiling: float,
    precision: float,
    slope: float = 1.5,
) -> tuple[float, float]:
    """Smallest x with excess(x) <= 0, from above; excess falls with x.

    Args:
        excess: function of x, zero where the budget is just met.
        start: first guess.
        ceiling: an x that is known to suffice.
        precision: accepted distance below zero of excess, or of x from its exact value.
        slope: first guess of -d excess / d x.

    Returns:
        x and the last slope seen.
    """
    low, high = -math.inf, ceiling
    x = min(start, ceiling)
    previous: tuple[float, float] | None = None
    for _ in range(60):
        value = excess(x)
        if value <= 0:
            high = min(high, x)
            if -value <= precision:
                break
        else:
            low = max(low, x)
        if high - low <= precision:
            break
        if previous is not None and math.isfinite(value) and value != previous[1]:
            slope = min(max(-(value - previous[1]) / (x - previous[0]), 0.05), 1e6)
        previous = (x, value) if math.isfinite(value) else None
        move = (value + 0.3 * precision) / slope if math.isfinite(value) else -1.0
        x += min(max(move, -1.0), 1.0)
        if not low < x < high:
            x = (low + high) / 2 if math.isfinite(low) else high - 1.0
    return high, slope
