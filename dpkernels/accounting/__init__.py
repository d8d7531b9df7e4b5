"""Privacy accounting without torch: what ran is data (events), how it is bounded is code.

The "tight" accountant is `tight`; Opacus' own are loaded on demand by `opacus_accountants`.
"""

from dpkernels.accounting.api import (
    get_delta,
    get_epsilon,
    get_history_epsilon,
    get_noise_multiplier,
)
from dpkernels.accounting.events import Phase, as_history
from dpkernels.accounting.tradeoff import trade_off

__all__ = [
    "Phase",
    "as_history",
    "get_delta",
    "get_epsilon",
    "get_history_epsilon",
    "get_noise_multiplier",
    "trade_off",
]
