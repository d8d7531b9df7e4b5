"""Fused kernels for differentially private training: per-sample clipping inside the backward pass.

``from dpkernels import PrivacyEngine`` stands where ``from opacus import PrivacyEngine`` stood.
Importing this package loads neither native code nor triton, nor torch: names resolve on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpkernels import ops
    from dpkernels.engine.privacy_engine import PrivacyEngine

__version__ = "0.1.0"
__all__ = ["PrivacyEngine", "__version__", "ops"]


def __getattr__(name: str) -> Any:
    if name == "PrivacyEngine":
        return importlib.import_module("dpkernels.engine.privacy_engine").PrivacyEngine
    if name == "ops":
        return importlib.import_module("dpkernels.ops")
    raise AttributeError(f"module 'dpkernels' has no attribute {name!r}")
