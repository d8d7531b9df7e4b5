"""The Gaussian mechanism in logs: exact at any epsilon (docs/math.md, "Full batch").

`mu` is sqrt(steps) / noise_multiplier, the separation of the two hypotheses.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import erfcx, log_ndtr, ndtri_exp

Values = Any
"""A float or an array of float64."""

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
_HALF_PI_ROOT = math.sqrt(math.pi / 2)


def _log_mills(x: Values) -> NDArray[np.float64]:
    """log of Phi(-x) / phi(x), for x >= 0."""
    return np.log(_HALF_PI_ROOT * erfcx(np.maximum(x, 0.0) / math.sqrt(2.0)))


def _log_delta_at(a: Values, b: Values) -> NDArray[np.float64]:
    """log of Phi(-a) - e^epsilon Phi(-b) where a, b = epsilon / mu -+ mu / 2 and a < b."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        log_null = log_ndtr(-a)
        ratio = np.where(
            a > 0,
            _log_mills(b) - _log_mills(a),
            np.where(
                b > 0,
                -0.5 * a * a - _LOG_SQRT_2PI + _log_mills(b) - log_null,
                (b - a) * (a + b) / 2 + log_ndtr(-b) - log_null,
            ),
        )
        return log_null + np.log(-np.expm1(np.minimum(ratio, 0.0)))


def log_delta(epsilon: Values, mu: Values) -> NDArray[np.float64]:
    """log delta of the Gaussian mechanism with separation `mu` at any real `epsilon`.

    Args:
        epsilon: scalar or array, any sign.
        mu: scalar or array that broadcasts with epsilon, >= 0.

    Returns:
        log delta, the shape of the broadcast; -inf where delta is 0.
    """
    epsilon, mu = np.broadcast_arrays(
        np.asarray(epsilon, dtype=np.float64), np.asarray(mu, dtype=np.float64)
    )
    safe_mu = np.where(mu > 0, mu, 1.0)
    centre = epsilon / safe_mu
    with np.errstate(divide="ignore"):
        at_zero = np.log(-np.expm1(np.minimum(epsilon, 0.0)))
    return np.where(mu > 0, _log_delta_at(centre - safe_mu / 2, centre + safe_mu / 2), at_zero)


def calibrate_mu(epsilon: float, log_delta_target: float) -> float:
    """The largest `mu` whose delta at `epsilon` >= 0 is the target.

    Solved in a = epsilon / mu - mu / 2, which stays near the normal quantile of delta at every
    epsilon, so that the cost and the precision do not depend on the size of epsilon.
    """

    def mu_of(a: float) -> float:
        root = math.hypot(a, math.sqrt(2 * epsilon))
        return 2 * epsilon / (a + root) if a > 0 else root - a

    def gap(a: float) -> float:
        return float(_log_delta_at(a, a + mu_of(a))) - log_delta_target

    high = float(-ndtri_exp(log_delta_target)) + 1e-9
    low = high - 1.0
    while gap(low) < 0:
        low -= high - low
    return mu_of(brentq(gap, low, high, xtol=1e-13, rtol=1e-14))


def epsilon(mu: float, log_delta_target: float) -> float:
    """The smallest epsilon >= 0 at which a Gaussian of separation `mu` has the target delta."""

    def gap(a: float) -> float:
        return float(_log_delta_at(a, a + mu)) - log_delta_target

    low = -mu / 2
    if gap(low) <= 0:
        return 0.0
    high = max(float(-ndtri_exp(log_delta_target)), low) + 1e-9
    a = brentq(gap, low, high, xtol=1e-13, rtol=1e-14)
    return max(0.0, mu * (a + mu / 2))
