"""The tight accountant: upper bounds on delta, epsilon and the noise that a budget needs.

Three regimes, each an upper bound with a relative error far below 1 %:
full batch (exact), participation mixture (small noise), discretised composition (the rest).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from dpkernels.accounting import gaussian
from dpkernels.accounting.composition import Composition, TiltedSum
from dpkernels.accounting.events import History, Phase, coarsen
from dpkernels.accounting.losses import step_laws
from dpkernels.accounting.participation import ParticipationMixture

_TOLERANCE = 2e-4
_ROUND_UP = 1e-7
_MAX_PHASES = 32
_MIXTURE_GAP = 1e-3
_MIXTURE_SIGMA = 0.3
_MIN_LOG_DELTA = -600.0


def spacing(tolerance: float, epsilon: float, steps: int, tilt: float) -> float:
    """Grid step at which the discretisation raises epsilon by about `tolerance`, relative."""
    return math.sqrt(12 * tolerance * epsilon / (steps * (1 + tilt)))


@dataclass(frozen=True)
class _Saddle:
    """Where the sum has to be looked at, by a saddle-point estimate that proves nothing."""

    tilt: float
    epsilon: float
    log_delta: float


class Profile:
    """delta(epsilon) of a history by discretised composition, both directions."""

    def __init__(self, history: History, log_delta: float, adversary: str = "worst_case") -> None:
        self.history = history
        self.composition = Composition(step_laws(history, adversary), log_delta - math.log(1e8))
        self.add_limit = -sum(
            phase.steps * (math.log1p(-phase.sample_rate) if phase.sample_rate < 1 else -math.inf)
            for phase in history
        )

    def saddles(self, tilts: np.ndarray, reverse: bool) -> tuple[np.ndarray, np.ndarray]:
        """(epsilon, estimated log delta) at which each tilt is the saddle point."""
        log_mgf, mean, spread = self.composition.cumulants(-1 - tilts if reverse else tilts)
        mean = -mean if reverse else mean
        epsilon = mean - 1 / tilts - 1 / (1 + tilts)
        width = spread + 1 / tilts**2 + 1 / (1 + tilts) ** 2
        log_delta = (
            log_mgf - tilts * epsilon - np.log(tilts) - np.log1p(tilts)
            - 0.5 * np.log(2 * math.pi * width)
        )
        return epsilon, log_delta

    def _solve_saddle(self, key: int, target: float, reverse: bool) -> _Saddle:
        """The saddle whose epsilon (key 0) or estimated log delta (key 1) is `target`."""
        sign = 1.0 if key == 0 else -1.0
        scale = max(abs(self.composition.max_loss), abs(self.composition.min_loss))
        logs = np.linspace(math.log(1e-4 / scale), math.log(1e-4 / scale) + 45.0, 46)
        for _ in range(3):
            values = sign * self.saddles(np.exp(logs), reverse)[key]
            above = np.flatnonzero(values >= sign * target)
            first = int(above[0]) if above.size else logs.size - 1
            low, high = logs[max(first - 1, 0)], logs[first]
            logs = np.linspace(low, high, 12)
        tilt = math.exp(logs[-1])
        epsilon, log_delta = self.saddles(np.array([tilt]), reverse)
        return _Saddle(tilt, float(epsilon[0]), float(log_delta[0]))

    def at_epsilon(self, epsilon: float, reverse: bool) -> _Saddle:
        """The saddle for a given epsilon."""
        return self._solve_saddle(0, epsilon, reverse)

    def at_delta(self, log_delta: float, reverse: bool) -> _Saddle:
        """The saddle for a given log delta."""
        return self._solve_saddle(1, log_delta, reverse)

    def _compose(self, saddle: _Saddle, epsilon: float, reverse: bool) -> TiltedSum:
        step = spacing(_TOLERANCE, epsilon, self.composition.steps, saddle.tilt)
        return self.composition.compose(-1 - saddle.tilt if reverse else saddle.tilt, step)

    def _bound(self, total: TiltedSum, epsilon: float, reverse: bool) -> float:
        return float(
            np.logaddexp(total.log_delta(epsilon, reverse=reverse), self.composition.log_cut)
        )

    def log_delta(self, epsilon: float) -> float:
        """log of an upper bound on delta at epsilon > 0."""
        return max(
            self._bound(self._compose(self.at_epsilon(epsilon, reverse), epsilon, reverse),
                        epsilon, reverse)
            for reverse in self._directions(epsilon)
        )

    def _directions(self, epsilon: float) -> tuple[bool, ...]:
        return (False, True) if epsilon < self.add_limit else (False,)

    def epsilon(self, log_delta: float) -> float:
        """An upper bound on epsilon at the given log delta."""
        epsilon = self._directed_epsilon(log_delta, False)
        if epsilon < self.add_limit:
            epsilon = max(epsilon, self._directed_epsilon(log_delta, True))
        return epsilon

    def _directed_epsilon(self, log_delta: float, reverse: bool) -> float:
        saddle = self.at_delta(log_delta, reverse)
        floor = 1e-12 * abs(self.composition.max_loss)
        guess = max(saddle.epsilon, floor)
        for _ in range(4):
            total = self._compose(saddle, guess, reverse)
            epsilon = self._invert(total, log_delta, guess, reverse)
            if 0.7 * guess <= epsilon <= 1.4 * guess:
                break
            guess = max(epsilon, floor)
            saddle = self.at_epsilon(guess, reverse)
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
        return high if gap(high) == 0 else brentq(gap, low, high, xtol=1e-9 * high, rtol=1e-9)


def log_saturation(history: History) -> float:
    """log of the probability that the record joins any step: delta never exceeds it."""
    log_absent = sum(
        phase.steps * (math.log1p(-phase.sample_rate) if phase.sample_rate < 1 else -math.inf)
        for phase in history
    )
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


def epsilon(history: History, delta: float) -> float:
    """An upper bound on epsilon at `delta` for what ran, under add/remove neighbours.

    Args:
        history: phases as `events.as_history` returns them.
        delta: in (0, 1).

    Returns:
        Epsilon >= 0, at most about 0.1 % above the exact value.
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
        bound = _mixture_epsilon(history[0], log_delta, full_batch * (1 + _ROUND_UP))
        if bound is not None:
            return bound * (1 + _ROUND_UP)
    composed = Profile(coarsen(history, _MAX_PHASES), log_delta).epsilon(log_delta)
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

    high = math.log(min(full_batch * (1 + _ROUND_UP), _MIXTURE_SIGMA))
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
    margin = 1 + 3 * _ROUND_UP
    full_batch = math.sqrt(steps) / gaussian.calibrate_mu(target, log_delta)
    if rate == 1:
        return full_batch * margin
    sigma = _mixture_noise(target, log_delta, rate, steps, full_batch)
    if sigma is not None:
        return sigma * margin

    def excess(log_sigma: float) -> float:
        spent = epsilon((Phase(math.exp(log_sigma), rate, steps),), delta)
        return math.log(spent / target) if spent > 0 else -math.inf

    start = math.log(_estimated_noise(target, log_delta, rate, steps, full_batch))
    return math.exp(_smallest_sufficient(excess, start, math.log(full_batch * margin)))


def _smallest_sufficient(excess: Callable[[float], float], start: float, ceiling: float) -> float:
    """Smallest x with excess(x) <= 0, to 1e-4 and from above; excess falls with x.

    Args:
        excess: function of x, zero where the budget is just met.
        start: first guess.
        ceiling: an x that is known to suffice.
    """
    precision, aim, slope = 1e-4, 3e-5, 1.5
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
        move = (value + aim) / slope if math.isfinite(value) else -1.0
        x += min(max(move, -1.0), 1.0)
        if not low < x < high:
            x = (low + high) / 2 if math.isfinite(low) else high - 1.0
    return high
