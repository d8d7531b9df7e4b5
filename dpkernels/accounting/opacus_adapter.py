"""Our accountant behind Opacus' interface and in its registry.

The only module of this package that imports Opacus as a whole, and torch with it.
"""

from __future__ import annotations

import math
from typing import Any

from opacus.accountants import IAccountant
from opacus.accountants.registry import register_accountant

from dpkernels.accounting import tight
from dpkernels.accounting.checks import check_number
from dpkernels.accounting.events import as_history
from dpkernels.accounting.opacus_accountants import MECHANISMS

MECHANISM = "tight"


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
        if state_dict and state_dict.get("mechanism") in MECHANISMS:
            state_dict = {**state_dict, "mechanism": MECHANISM}
        super().load_state_dict(state_dict)


def register() -> None:
    """Makes `PrivacyEngine(accountant="tight")` known to Opacus; calling it again is harmless."""
    register_accountant(MECHANISM, TightAccountant, force=True)
