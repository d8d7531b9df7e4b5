"""Attacks that reconstruct records from the very gradient that the engine releases.

Each attack takes the records, poses as the server (or listens to the server), runs real private
steps through `dpkernels.PrivacyEngine`, and returns candidates read out of ``p.grad``. Nothing is
simulated: the attacked gradient is the gradient that would have been sent (docs/math.md,
section 6). The attacks need torch, unlike the bounds; names resolve on first use, as the command
line imports this package without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpkernels.attacks.inversion import gradient_matching
    from dpkernels.attacks.malicious import imprint, trap_weights
    from dpkernels.attacks.optimal import linear_optimal

__all__ = ["gradient_matching", "imprint", "linear_optimal", "trap_weights"]


def __getattr__(name: str) -> Any:
    for module in ("inversion", "malicious", "optimal") if name in __all__ else ():
        found = importlib.import_module(f"{__name__}.{module}")
        if hasattr(found, name):
            return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
