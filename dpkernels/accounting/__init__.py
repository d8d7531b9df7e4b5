"""Privacy accounting without torch: what ran is data (events), how it is bounded is code.

The accountants are listed in `accountants`: "tight" is `tight`; Opacus' own are loaded on demand by
`opacus_accountants`.
"""

from dpkernels.accounting.accountants import Accountant, register_accountant
from dpkernels.accounting.api import (
    get_delta,
    get_epsilon,
    get_history_epsilon,
    get_noise_multiplier,
)
from dpkernels.accounting.events import Phase, as_history
from dpkernels.accounting.tradeoff import trade_off

__all__ = [
    "Accountant",
    "Phase",
    "as_history",
    "get_delta",
    "get_epsilon",
    "get_history_epsilon",
    "get_noise_multiplier",
    "register_accountant",
    "trade_off",
]
