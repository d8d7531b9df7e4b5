"""The accountants by name: the one table that every `accountant=` and `--accountant` reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from scipy.optimize import brentq

from dpkernels.accounting import calibration, opacus_accountants, tight
from dpkernels.accounting.events import History, Phase

_MAX_SIGMA = 1e7
_MIN_SIGMA = 1e-8


@dataclass(frozen=True)
class Accountant:
    """How one accountant bounds what ran.

    Attributes:
        name: what `accountant=` calls it.
        meaning: what it is, in words that can follow "the epsilon of".
        epsilon: epsilon >= 0 of a history that is not empty, at a delta in (0, 1); falls as the
            noise rises. It raises a ValueError that begins with ``accountant='<name>'`` for what
            the accountant cannot account for.
        upper_bound: whether epsilon is never below the exact one. No guarantee rests on an
            accountant for which that is not proven.
        calibrate: noise multiplier for an epsilon, a delta, a sample rate and a number of steps.
            None searches for the noise at which `epsilon` meets the budget.
    """

    name: str
    meaning: str
    epsilon: Callable[[History, float], float]
    upper_bound: bool = True
    calibrate: Callable[[float, float, float, int], float] | None = None

    def noise_multiplier(self, target: float, delta: float, rate: float, steps: int) -> float:
        """The noise multiplier for a budget: calibrated, or searched for to a relative 1e-8.

        Opacus' own search stops at an absolute difference in epsilon, which never ends at large
        budgets; this one is relative throughout.

        Args:
            target: epsilon > 0.
            delta: in (0, 1).
            rate: sample rate, in (0, 1].
            steps: number of steps.

        Raises:
            ValueError: no noise meets the budget, or the accountant cannot answer.
        """
        if self.calibrate is not None:
            return self.calibrate(target, delta, rate, steps)

        def spent(log_sigma: float) -> float:
            return self.epsilon((Phase(math.exp(log_sigma), rate, steps),), delta)

        def first(accepts: Callable[[float], bool], x: float, move: float) -> float:
            while not accepts(x):
                x += move
                if not math.log(_MIN_SIGMA) < x < math.log(_MAX_SIGMA):
                    raise ValueError(
                        f"target_epsilon={target!r}: out of reach of accountant={self.name!r} at "
                        f"any noise_multiplier up to {_MAX_SIGMA:g}. Use accountant='tight'"
                    )
            return x

        start = math.log(calibration.noise_multiplier(target, delta, rate, steps))
        low = first(lambda x: spent(x) > target, start, -math.log(2))
        high = first(lambda x: spent(x) <= target, max(low, start), math.log(2))
        root = brentq(lambda x: math.log(max(spent(x), 1e-300) / target), low, high, xtol=1e-9)
        above = (root, root + 2e-9, root + 1e-8, root + 1e-6, high)
        return math.exp(next(x for x in above if spent(x) <= target))


_BUILT_IN = (
    Accountant(
        "tight",
        "a tight accountant, so it is what the noise guarantees",
        tight.epsilon,
        calibrate=calibration.noise_multiplier,
    ),
    Accountant(
        "rdp",
        "Opacus' RDP accountant at its default orders, which most published budgets mean",
        partial(opacus_accountants.epsilon, "rdp"),
    ),
    Accountant("prv", "Opacus' PRV accountant", partial(opacus_accountants.epsilon, "prv")),
    Accountant(
        "gdp",
        "Opacus' GDP accountant, which can state less than the true epsilon",
        partial(opacus_accountants.epsilon, "gdp"),
        upper_bound=False,
    ),
)

ACCOUNTANTS = {accountant.name: accountant for accountant in _BUILT_IN}
"""By name; `register_accountant` adds to it."""


def register_accountant(accountant: Accountant) -> None:
    """Make an accountant known by its name wherever one is chosen.

    Raises:
        ValueError: another accountant has the name.
    """
    if ACCOUNTANTS.setdefault(accountant.name, accountant) is not accountant:
        raise ValueError(f"name={accountant.name!r}: expected one that no other accountant has")


def accountant_named(name: str) -> Accountant:
    """The accountant of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in ACCOUNTANTS:
        raise ValueError(f"accountant={name!r}: expected one of {sorted(ACCOUNTANTS)}")
    return ACCOUNTANTS[name]


def guaranteeing() -> list[str]:
    """Names of the accountants on which a guarantee can rest."""
    return [name for name, accountant in ACCOUNTANTS.items() if accountant.upper_bound]
