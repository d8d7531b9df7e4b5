"""The bridge to Opacus: our accountant in its registry, its accountants behind our functions.

The only module of this package that imports Opacus, and torch with it; import it on demand.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from opacus.accountants import GaussianAccountant, IAccountant, PRVAccountant, RDPAccountant
from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV
from opacus.accountants.registry import register_accountant
from scipy.optimize import brentq

from dpkernels.accounting import calibration, tight
from dpkernels.accounting.checks import check_number
from dpkernels.accounting.events import History, as_history

MECHANISM = "tight"
_PRV_MAX_CELLS = 1 << 24
_MAX_SIGMA = 1e7
_MIN_SIGMA = 1e-8


class TightAccountant(IAccountant):
    """Opacus' accountant interface over the tight bounds (docs/accounting.md).

    Guarantees:
        `get_epsilon` is never below the exact epsilon of the recorded history under add/remove
        neighbours and Poisson sampling, and at most 1 % above it.
    """

    def __init__(self) -> None:
        super().__init__()

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Records one optimizer step; equal neighbours share an entry of the history."""
        if self.history and self.history[-1][:2] == (noise_multiplier, sample_rate):
            self.history[-1] = (noise_multiplier, sample_rate, self.history[-1][2] + 1)
        else:
            self.history.append((noise_multiplier, sample_rate, 1))

    def get_epsilon(self, delta: float, *args: Any, **kwargs: Any) -> float:
        """Epsilon spent so far; infinite if a step ran without noise.

        Args:
            delta: in (0, 1).

        Raises:
            ValueError: if delta or an entry of the history is out of range.
        """
        check_number("delta", delta, above=0.0, below=1.0)
        if any(sigma == 0 and rate > 0 for sigma, rate, _ in self.history):
            return math.inf
        return tight.epsilon(as_history(tuple(entry) for entry in self.history), delta)

    def __len__(self) -> int:
        return len(self.history)

    @classmethod
    def mechanism(cls) -> str:
        return MECHANISM

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a history, also one that an accountant of Opacus has counted.

        All of them record (noise multiplier, sample rate, steps) of the same mechanism.

        Raises:
            ValueError: it is not the state of such an accountant.
        """
        if state_dict and state_dict.get("mechanism") in _ACCOUNTANTS:
            state_dict = {**state_dict, "mechanism": MECHANISM}
        super().load_state_dict(state_dict)


def register() -> None:
    """Makes `PrivacyEngine(accountant="tight")` known to Opacus; calling it again is harmless."""
    register_accountant(MECHANISM, TightAccountant, force=True)


def _prv_cells(accountant: PRVAccountant, delta: float) -> int:
    """Cells that Opacus' PRV accountant would need, or 0 if it can hold them."""
    prvs = [PoissonSubsampledGaussianPRV(rate, sigma) for sigma, rate, _ in accountant.history]
    domain = accountant._get_domain(
        prvs=prvs,
        num_self_compositions=[steps for *_, steps in accountant.history],
        eps_error=0.01,
        delta_error=delta / 1000,
    )
    return int(domain.size) if domain.size > _PRV_MAX_CELLS else 0


_ACCOUNTANTS: dict[str, type[IAccountant]] = {
    "rdp": RDPAccountant,
    "prv": PRVAccountant,
    "gdp": GaussianAccountant,
}


def epsilon(mechanism: str, history: History, delta: float) -> float:
    """Epsilon under one of Opacus' accountants at its defaults.

    Args:
        mechanism: "rdp", "prv" or "gdp".
        history: what ran.
        delta: in (0, 1).

    Raises:
        ValueError: if the accountant cannot hold such a history, or fails on it.
    """
    if not history:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accountant = _ACCOUNTANTS[mechanism]()
        accountant.history = [(p.noise_multiplier, p.sample_rate, p.steps) for p in history]
        if isinstance(accountant, GaussianAccountant) and len(history) > 1:
            raise ValueError(
                "accountant='gdp': expected one noise multiplier and one sample rate, got "
                f"{len(history)} different pairs. Use accountant='tight'"
            )
        try:
            too_large = isinstance(accountant, PRVAccountant) and _prv_cells(accountant, delta)
            spent = math.nan if too_large else float(accountant.get_epsilon(delta=delta))
        except (ArithmeticError, RuntimeError, MemoryError, ValueError) as error:
            raise ValueError(
                f"accountant={mechanism!r}: Opacus' accountant fails on history="
                f"{accountant.history!r}, delta={delta!r} ({error}). Use accountant='tight'"
            ) from error
    if too_large:
        raise ValueError(
            f"accountant='prv': Opacus' PRV accountant would need a grid of {too_large:.3g} cells "
            f"({too_large * 8 / 2**30:.3g} GiB an array) at this noise; expected at most "
            f"{_PRV_MAX_CELLS:.3g}. Use accountant='tight'"
        )
    return spent


def noise_multiplier(mechanism: str, target: float, delta: float, rate: float, steps: int) -> float:
    """Noise multiplier for a budget under one of Opacus' accountants, to a relative 1e-8.

    Opacus' own search stops at an absolute difference in epsilon, which never ends at large
    budgets; this one is relative throughout.

    Raises:
        ValueError: if the accountant cannot certify the budget at any noise multiplier.
    """

    def spent(log_sigma: float) -> float:
        return epsilon(mechanism, as_history([(math.exp(log_sigma), rate, steps)]), delta)

    start = math.log(calibration.noise_multiplier(target, delta, rate, steps))
    low = _expand(lambda x: spent(x) > target, start, -math.log(2), mechanism, target)
    high = _expand(lambda x: spent(x) <= target, max(low, start), math.log(2), mechanism, target)
    root = brentq(lambda x: math.log(max(spent(x), 1e-300) / target), low, high, xtol=1e-9)
    return math.exp(next(x for x in _above(root, high) if spent(x) <= target))


def _above(root: float, high: float) -> Sequence[float]:
    return [root, root + 2e-9, root + 1e-8, root + 1e-6, high]


def _expand(
    accepts: Callable[[float], bool], start: float, move: float, mechanism: str, target: float
) -> float:
    x = start
    while not accepts(x):
        x += move
        if not math.log(_MIN_SIGMA) < x < math.log(_MAX_SIGMA):
            raise ValueError(
                f"target_epsilon={target!r}: out of reach of accountant={mechanism!r} at any "
                f"noise_multiplier up to {_MAX_SIGMA:g}. Use accountant='tight'"
            )
    return x
