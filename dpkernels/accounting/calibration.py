"""The noise multiplier that a budget needs, under the tight accountant."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from scipy.optimize import brentq

from dpkernels.accounting import gaussian
from dpkernels.accounting.events import Phase
from dpkernels.accounting.participation import ParticipationMixture
from dpkernels.accounting.profile import COARSE, FINE, Profile
from dpkernels.accounting.tight import (
    MIXTURE_GAP,
    MIXTURE_SIGMA,
    ROUND_UP,
    SOLVER,
    epsilon,
    log_saturation,
)


def _mixture_noise(
    target: float, log_delta: float, rate: float, steps: int, full_batch: float
) -> float | None:
    """Noise multiplier by the participation mixture where it is certified, else None."""
    mixture = ParticipationMixture(rate, steps, log_delta)

    def gap(log_sigma: float) -> float:
        return mixture.upper(target, math.exp(log_sigma)) - log_delta

    high = math.log(min(full_batch * (1 + SOLVER), MIXTURE_SIGMA))
    if gap(high) > 0:
        return None
    low = high - 1.0
    while gap(low) <= 0:
        high, low = low, low - 2 * (high - low)
    sigma = math.exp(brentq(gap, low, high, xtol=1e-10))
    certified = mixture.lower(target, sigma / (1 + MIXTURE_GAP)) >= log_delta
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
    margin = 1 + SOLVER
    target = target / (1 + ROUND_UP)
    full_batch = math.sqrt(steps) / gaussian.calibrate_mu(target, log_delta)
    if rate == 1:
        return full_batch * margin
    sigma = _mixture_noise(target, log_delta, rate, steps, full_batch)
    if sigma is not None:
        return sigma * margin

    def excess(log_sigma: float, tolerance: float) -> float:
        spent = epsilon((Phase(math.exp(log_sigma), rate, steps),), delta, tolerance)
        spent /= 1 + ROUND_UP
        return math.log(spent / target) if spent > 0 else -math.inf

    start = math.log(_estimated_noise(target, log_delta, rate, steps, full_batch))
    ceiling = math.log(full_batch * margin)
    near, slope = _smallest_sufficient(partial(excess, tolerance=COARSE), start, ceiling, 4e-3)
    log_sigma, _ = _smallest_sufficient(
        partial(excess, tolerance=FINE), near - COARSE / slope, ceiling, 5e-4, slope
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
