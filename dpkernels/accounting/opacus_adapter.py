"""Our accountants behind Opacus' interface and in its registry.

The only module of this package that imports Opacus as a whole, and torch with it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from opacus.accountants import IAccountant
from opacus.accountants.registry import register_accountant

from dpkernels.accounting.accountants import ACCOUNTANTS
from dpkernels.accounting.api import get_history_epsilon
from dpkernels.accounting.checks import check_number
from dpkernels.accounting.opacus_accountants import MECHANISMS


class HistoryAccountant(IAccountant):
    """Opacus' accountant interface over an accountant of ours: keeps the history of steps.

    Args:
        name: of the accountant.

    Guarantees:
        Under "tight", `get_epsilon` is never below the exact epsilon of the recorded history under
        add/remove neighbours and Poisson sampling, and at most 1 % above it.
    """

    def __init__(self, name: str = "tight") -> None:
        super().__init__()
        self._name = name

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
            ValueError: if delta or an entry of the history is out of range, or the accountant
                cannot account for the history.
        """
        check_number("delta", delta, above=0.0, below=1.0)
        if any(sigma == 0 and rate > 0 for sigma, rate, _ in self.history):
            return math.inf
        history = (tuple(entry) for entry in self.history)
        return get_history_epsilon(history, delta=delta, accountant=self._name)

    def __len__(self) -> int:
        return len(self.history)

    def mechanism(self) -> str:  # type: ignore[override]  # of the instance, as the name is
        return self._name

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a history, also one that another accountant has counted.

        All of them record (noise multiplier, sample rate, steps) of the same mechanism.

        Raises:
            ValueError: it is not the state of such an accountant.
        """
        if state_dict and state_dict.get("mechanism") in ACCOUNTANTS:
            state_dict = {**state_dict, "mechanism": self._name}
        super().load_state_dict(state_dict)


def has(mechanism: str) -> bool:
    """Whether an accountant is ours: in the table, and not Opacus' own."""
    return mechanism in ACCOUNTANTS and mechanism not in MECHANISMS


def register() -> None:
    """Makes our accountants known to Opacus by their names; calling it again is harmless."""
    for name in filter(has, ACCOUNTANTS):
        register_accountant(name, partial(HistoryAccountant, name), force=True)
