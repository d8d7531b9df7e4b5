"""The trade-off function: what any test of one record's participation must pay.

A test of "the record never joined" against "it may have joined" has false alarms alpha and misses
beta; `power` is 1 - beta (docs/math.md, "Trade-off function"). Every value errs towards the
adversary: power from above, misses from below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_ndtr, ndtr, ndtri

from dpkernels.accounting.checks import check_number
from dpkernels.accounting.composition import Composition, Window
from dpkernels.accounting.events import History, Phase, as_history, coarsen, log_absence
from dpkernels.accounting.losses import Array, step_laws

_TOLERANCE = 1e-5
_ROUND_OUT = 1e-6
_MAX_PHASES = 32


@dataclass(frozen=True)
class TestPoint:
    """One optimal test.

    Attributes:
        power: upper bound on the probability of detecting the record.
        miss: lower bound on the probability of missing it; accurate where power is close to 1.
    """

    __test__ = False

    power: float
    miss: float


@dataclass(frozen=True)
class _Curve:
    """Optimal tests "S is at least losses[i]" and their errors, i = 0 .. cells.

    Attributes:
        losses: grid, [cells].
        alpha: false alarms, decreasing, [cells + 1].
        beta: misses, increasing, [cells + 1].
        power: 1 - beta without cancellation, decreasing, [cells + 1].
    """

    losses: Array
    alpha: Array
    beta: Array
    power: Array

    def steepness(self, i: int) -> float:
        """-d log(power) / d loss on a stretch from cell i on that halves the power."""
        level = self.power[i - 1]
        end = int(np.searchsorted(-self.power, -level / 2))
        if level <= 0 or end >= self.losses.size:
            return 0.0
        return math.log(level / max(self.power[end], 1e-300)) / (
            self.losses[end] - self.losses[i - 1]
        )


def _least_index(rising: Array, value: float) -> int:
    """Least i >= 1 at which a rising array has reached `value`; the last one if none has."""
    return int(np.clip(np.searchsorted(rising, value), 1, rising.size - 1))


def _between(wanted: Array, known: Array, i: int, value: float) -> float:
    """`wanted` where `known` is `value`, on the line between the entries i - 1 and i."""
    gap = known[i] - known[i - 1]
    share = float(np.clip((value - known[i - 1]) / gap, 0.0, 1.0)) if gap != 0 else 0.0
    return float(wanted[i - 1] + share * (wanted[i] - wanted[i - 1]))


def _tail_sums(mass: Array, exponents: Array, above: bool) -> tuple[Array, Array]:
    """Sums of mass * exp(exponents) below and from each cell on; one is summed, one complements.

    Args:
        mass: tilted masses, [cells].
        exponents: what undoes the tilt, [cells].
        above: sum from each cell on, where the exponents fall; else below, where they rise.
    """
    plain = mass * np.exp(np.minimum(exponents, 600.0))
    if above:
        upper = np.minimum(np.append(np.cumsum(plain[::-1])[::-1], 0.0), 1.0)
        return 1.0 - upper, upper
    lower = np.minimum(np.append(0.0, np.cumsum(plain)), 1.0)
    return lower, 1.0 - lower


class TradeOff:
    """Optimal tests between "never joined" and "may have joined" for one adversary.

    Args:
        history: phases as `events.as_history` returns them, not empty.
        adversary: "worst_case" or "relaxed".
        log_least: log of the smallest error probability that will be asked for.

    Raises:
        ValueError: if the adversary is not known.
    """

    def __init__(self, history: History, adversary: str, log_least: float) -> None:
        laws = step_laws(coarsen(history, _MAX_PHASES), adversary)
        self._sum = Composition(laws, log_least - math.log(1e8))

    def test_at_alpha(self, alpha: float) -> TestPoint:
        """The optimal test with the given false alarms, in (0, 1)."""
        tilt = self.tilt_at_alpha(alpha)
        curve, i = self._refined(tilt, lambda curve: _least_index(-curve.alpha, -alpha))
        power = _between(curve.power, curve.alpha, i, alpha)
        return TestPoint(power, _between(curve.beta, curve.alpha, i, alpha))

    def tilt_at_alpha(self, alpha: float) -> float:
        """The tilt that moves the summed loss to the threshold of `test_at_alpha`."""
        return self._chernoff_tilt(alpha, none=-1.0, less=1.0)

    def alpha_at_beta(self, beta: float) -> float:
        """The smallest false alarms of any test with the given misses, in (0, 1)."""
        tilt = self._chernoff_tilt(beta, none=0.0, less=-1.0)
        curve, i = self._refined(tilt, lambda curve: _least_index(curve.beta, beta))
        return _between(curve.alpha, curve.beta, i, beta)

    def balanced(self) -> tuple[float, float]:
        """(alpha, beta) of the test that rejects where the loss is positive: slope -1."""
        tilt = self._falling_root(lambda tilt: -self._moments(tilt)[1], -1.0, 0.0)
        curve, i = self._refined(
            tilt, lambda curve: max(1, int(np.searchsorted(curve.losses, 0.0, side="right")))
        )
        return float(curve.alpha[i]), float(curve.beta[i])

    def _moments(self, tilt: float) -> tuple[float, float, float]:
        log_mgf, mean, spread = self._sum.cumulants(tilt)
        return float(log_mgf[0]), float(mean[0]), float(spread[0])

    @staticmethod
    def _falling_root(gap: Callable[[float], float], start: float, end: float) -> float:
        """Where gap, positive at `start`, changes sign on the way to `end` or beyond it."""
        move = end - start
        while gap(end) > 0 and abs(move) < 1e15:
            start, move = end, 4 * move
            end = start + move
        for _ in range(50):
            middle = (start + end) / 2
            if gap(middle) > 0:
                start = middle
            else:
                end = middle
        return end

    def _chernoff_tilt(self, error: float, none: float, less: float) -> float:
        """The tilt whose Chernoff bound on an error, or on 1 - error, is that value.

        Args:
            error: alpha or beta, in (0, 1).
            none: the tilt at which the bound is 1: -1 for alpha, 0 for beta.
            less: +1 or -1, the direction in which the bound on the error falls.
        """
        log_error = math.log(min(error, 1 - error))

        def gap(tilt: float) -> float:
            log_mgf, mean, _ = self._moments(tilt)
            return log_mgf - (tilt - none) * mean - log_error

        return self._falling_root(gap, none, none + less if error < 0.5 else none - less)

    def _plan(self, tilt: float, hazard: float) -> tuple[Window, float]:
        """Window and spacing; smaller tilts than the saddle point may have narrower windows."""
        _, mean, spread = self._moments(tilt)
        steps = self._sum.steps
        spacing = min(math.sqrt(12 * _TOLERANCE / (steps * hazard)), math.sqrt(spread) / 8)
        shares = (1.0, 0.7, 0.4) if tilt > 0 else (1.0,)
        base = self._moments(tilt)[0] - tilt * mean
        windows = []
        for share in shares:
            excess = self._moments(share * tilt)[0] - share * tilt * mean - base
            if excess < 12:
                windows.append(self._sum.window(share * tilt, spacing, 34.0 + excess))
        return min(windows, key=lambda window: window.width), spacing

    def _refined(self, tilt: float, locate: Callable[[_Curve], int]) -> tuple[_Curve, int]:
        """The curve near a tilt and an index on it, on a grid as fine as the tail is steep."""
        hazard = max(abs(tilt), abs(tilt + 1))
        for _ in range(4):
            curve = self._tests(*self._plan(tilt, hazard))
            i = locate(curve)
            steepness = curve.steepness(i)
            if steepness <= 2 * hazard:
                break
            hazard = steepness
        return curve, i

    def _tests(self, window: Window, spacing: float) -> _Curve:
        total = self._sum.compose(window, spacing)
        tilt = total.tilt
        beta, power = _tail_sums(total.mass, total.log_mgf - tilt * total.losses, tilt > 0)
        _, alpha = _tail_sums(total.mass, total.log_mgf - (tilt + 1) * total.losses, tilt > -1)
        cut = math.exp(self._sum.log_cut)
        return _Curve(
            losses=total.losses,
            alpha=np.maximum(alpha - cut, 0.0),
            beta=np.maximum(beta - cut, 0.0),
            power=np.minimum(power + cut, 1.0),
        )


def _loudest_step_miss(history: History, alpha: float) -> float:
    """Misses of the test that rejects when any single step looks like participation.

    Each step may alarm falsely with the probability that makes `alpha` in total. An upper bound
    on the misses of the optimal test, sharp where the noise is small.
    """
    steps = sum(phase.steps for phase in history)
    log_quiet = math.log1p(-alpha) / steps
    threshold = -float(ndtri(-math.expm1(log_quiet) / 2))
    log_miss = math.log1p(-alpha)
    for phase in history:
        seen = float(log_ndtr(threshold - 1 / phase.noise_multiplier)) - log_quiet
        ratio = phase.sample_rate * math.expm1(min(seen, 0.0))
        log_miss += phase.steps * (math.log1p(ratio) if ratio > -1 else -math.inf)
    return math.exp(log_miss)


def optimal_test(history: History, alpha: float, adversary: str) -> TestPoint:
    """The best test of "may have joined" (the remove direction) at the given false alarms.

    Args:
        history: phases as `events.as_history` returns them.
        alpha: probability of a false alarm, in (0, 1).
        adversary: "worst_case" knows the direction of the record's gradient, "relaxed" its size
            only.

    Returns:
        Power in [alpha, 1 - P(the record never joins) * (1 - alpha)] and misses, each erring
        towards the adversary.

    Raises:
        ValueError: if the adversary is not known.
    """
    laws = step_laws(history, adversary)
    if not history:
        return TestPoint(alpha, 1 - alpha)
    floor = math.exp(log_absence(history)) * (1 - alpha)  # a record that never joined is safe
    limit = 1 - floor
    if adversary == "worst_case" and all(law.rate == 1 for law in laws):
        mu = math.sqrt(sum(phase.steps / phase.noise_multiplier**2 for phase in history))
        z = float(ndtri(alpha)) + mu
        return TestPoint(min(1.0, float(ndtr(z)) * (1 + 1e-9)), float(ndtr(-z)) * (1 - 1e-9))
    if _loudest_step_miss(history, alpha) <= max(floor * (1 + 1e-6), 1e-12):
        return TestPoint(limit, floor)
    point = TradeOff(history, adversary, math.log(min(alpha, 1 - alpha))).test_at_alpha(alpha)
    return TestPoint(
        power=min(max(point.power * (1 + _ROUND_OUT), alpha), limit),
        miss=min(max(point.miss * (1 - _ROUND_OUT), floor), 1 - alpha),
    )


def _reverse_miss(history: History, alpha: float, adversary: str) -> float:
    """Misses of the best test of "never joined" (the add direction), from below."""
    log_absent = log_absence(history)
    least = max(0.0, 1 - alpha / math.exp(log_absent)) if log_absent > -700 else 0.0  # of float64
    probe = min(least + 1e-7 * max(least, 1e-3), (1 + least) / 2)
    if probe < 1 and _loudest_step_miss(history, probe) <= alpha:
        return least
    pair = TradeOff(history, adversary, math.log(min(alpha, 1 - alpha)))
    return min(pair.alpha_at_beta(alpha) * (1 - _ROUND_OUT), 1 - alpha)


def _symmetric_miss(history: History, adversary: str) -> Callable[[float], float]:
    """The lower hull of both directions, joined by their common tangent of slope -1."""
    absent = math.exp(log_absence(history))
    if _loudest_step_miss(history, 1e-7) <= max(absent * (1 + 1e-6), 1e-12):
        low, high = 0.0, absent
    else:
        low, high = sorted(TradeOff(history, adversary, -7.0).balanced())

    def miss(alpha: float) -> float:
        if low < alpha < high:
            return (low + high - alpha) * (1 - _ROUND_OUT)
        remove = optimal_test(history, alpha, adversary).miss
        return min(remove, _reverse_miss(history, alpha, adversary))

    return miss


def trade_off(
    alpha: ArrayLike,
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    adversary: str = "worst_case",
    direction: str = "both",
) -> float | Array:
    """The least misses beta = f(alpha) that a test with `alpha` false alarms can have.

    Args:
        alpha: false alarms in [0, 1], scalar or array.
        noise_multiplier: std of the noise divided by max_grad_norm, > 0.
        sample_rate: in [0, 1].
        steps: an integer >= 1.
        adversary: "worst_case" knows the direction of the record's gradient; "relaxed" knows its
            size only.
        direction: "remove" tests for participation against none, "add" the reverse, "both" is
            what differential privacy promises: the lower hull of the two.

    Returns:
        Misses, a float or an array of alpha's shape: lower bounds, a relative 1e-4 from exact.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    if direction not in ("both", "remove", "add"):
        raise ValueError(f"direction={direction!r}: expected one of ['add', 'both', 'remove']")
    history = as_history([Phase(noise_multiplier, sample_rate, steps)])
    alphas = np.asarray(alpha, dtype=np.float64)
    step_laws(history, adversary)
    misses = {
        "remove": lambda value: optimal_test(history, value, adversary).miss,
        "add": lambda value: _reverse_miss(history, value, adversary),
    }
    trivial = not history
    if direction == "both" and not trivial:
        misses["both"] = _symmetric_miss(history, adversary)
    result = np.empty(alphas.shape)
    for place, value in np.ndenumerate(alphas):
        check_number("alpha", float(value), at_least=0.0, at_most=1.0)
        result[place] = 1 - value if trivial or value in (0.0, 1.0) else misses[direction](value)
    return float(result) if alphas.ndim == 0 else result
