"""3D segmentation with per-patient differential privacy: trainer, command line, phantom.

The names below resolve on first use, so that `dpkernels segment --help` loads neither torch nor
MONAI.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpkernels.segmentation.config import SegmentationConfig
    from dpkernels.segmentation.trainer import SegmentationTrainer

__all__ = ["SegmentationConfig", "SegmentationTrainer"]

_HOME = {
    "SegmentationConfig": "dpkernels.segmentation.config",
    "SegmentationTrainer": "dpkernels.segmentation.trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
