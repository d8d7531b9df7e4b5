"""The noise multiplier that a budget needs, by search over an accountant's epsilon."""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy.optimize import brentq

from dpkernels.accounting import calibration
from dpkernels.accounting.events import History, Phase

_MAX_SIGMA = 1e7
_MIN_SIGMA = 1e-8


def noise_multiplier(
    name: str,
    epsilon: Callable[[History, float], float],
    target: float,
    delta: float,
    rate: float,
    steps: int,
) -> float:
    """Noise multiplier for a budget under an accountant, to a relative 1e-8.

    Opacus' own search stops at an absolute difference in epsilon, which never ends at large
    budgets; this one is relative throughout.

    Args:
        name: of the accountant, for the error.
        epsilon: of a history at a delta; falls as the noise rises.
        target: epsilon > 0.
        delta: in (0, 1).
        rate: sample rate, in (0, 1].
        steps: number of steps.

    Raises:
        ValueError: if the accountant cannot certify the budget at any noise multiplier.
    """

    def spent(log_sigma: float) -> float:
        return epsilon((Phase(math.exp(log_sigma), rate, steps),), delta)

    def first(accepts: Callable[[float], bool], x: float, move: float) -> float:
        while not accepts(x):
            x += move
            if not math.log(_MIN_SIGMA) < x < math.log(_MAX_SIGMA):
                raise ValueError(
                    f"target_epsilon={target!r}: out of reach of accountant={name!r} at any "
                    f"noise_multiplier up to {_MAX_SIGMA:g}. Use accountant='tight'"
                )
        return x

    start = math.log(calibration.noise_multiplier(target, delta, rate, steps))
    low = first(lambda x: spent(x) > target, start, -math.log(2))
    high = first(lambda x: spent(x) <= target, max(low, start), math.log(2))
    root = brentq(lambda x: math.log(max(spent(x), 1e-300) / target), low, high, xtol=1e-9)
    above = (root, root + 2e-9, root + 1e-8, root + 1e-6, high)
    return math.exp(next(x for x in above if spent(x) <= target))
