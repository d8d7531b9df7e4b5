"""The tight accountant: upper bounds on epsilon and delta of what ran.

Three regimes, each an upper bound with a relative error far below 1 %: full batch (exact),
participation mixture (small noise), discretised composition (the rest).
"""

from __future__ import annotations

import math

from scipy.optimize import brentq

from dpkernels.accounting import gaussian
from dpkernels.accounting.events import History, coarsen, log_absence
from dpkernels.accounting.participation import ParticipationMixture, revealed_epsilon
from dpkernels.accounting.profile import FINE, Profile

ROUND_UP = 1e-4
"""Every epsilon is rounded up by this, relative: far more than float64 can have lost."""

MIXTURE_SIGMA = 0.3
"""Noise below which the participation mixture is tried."""

MIXTURE_GAP = 1e-3
"""Relative gap between upper and lower bound at which the mixture is accepted."""

SOLVER = 1e-7
"""Relative margin over a root that a solver found."""

_MAX_PHASES = 32
_MAX_REVEALED = 16
_MIN_LOG_DELTA = -600.0


def log_saturation(history: History) -> float:
    """log of the probability that the record joins any step: delta never exceeds it."""
    log_absent = log_absence(history)
    return math.log(-math.expm1(log_absent)) if log_absent < 0 else -math.inf


def _separation(history: History) -> float:
    """mu of the Gaussian that dominates the history: as if every record joined every step."""
    return math.sqrt(sum(phase.steps / phase.noise_multiplier**2 for phase in history))


def _mixture_epsilon(history: History, log_delta: float, ceiling: float) -> tuple[float, bool]:
    """Epsilon by participation mixtures, from above, and whether a lower bound certifies it."""
    if len(history) > 1:
        return revealed_epsilon(coarsen(history, _MAX_REVEALED), log_delta, ceiling)
    (phase,) = history
    mixture = ParticipationMixture(phase.sample_rate, phase.steps, log_delta)
    sigma = phase.noise_multiplier

    def gap(log_epsilon: float) -> float:
        return mixture.upper(math.exp(log_epsilon), sigma) - log_delta

    high = math.log(ceiling)
    if gap(high) > 0:
        return ceiling, False
    low = high - 1.0
    while gap(low) <= 0:
        high, low = low, low - 2 * (high - low)
        if low < math.log(ceiling) - 60:
            return ceiling, False
    epsilon = math.exp(brentq(gap, low, high, xtol=1e-10))
    return epsilon, mixture.lower(epsilon / (1 + MIXTURE_GAP), sigma) >= log_delta


def epsilon(history: History, delta: float, tolerance: float = FINE) -> float:
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
        return full_batch * (1 + ROUND_UP)
    if full_batch == 0.0:
        return 0.0
    ceiling = full_batch * (1 + SOLVER)
    if min(phase.noise_multiplier for phase in history) < MIXTURE_SIGMA:
        ceiling, certified = _mixture_epsilon(history, log_delta, ceiling)
        if certified:
            return ceiling * (1 + ROUND_UP)
    composed = Profile(coarsen(history, _MAX_PHASES), log_delta).epsilon(log_delta, tolerance)
    return min(composed, ceiling) * (1 + ROUND_UP)


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
