"""3D segmentation with per-patient differential privacy: trainer, command line, phantom.

The trainer's class is found on first use, so that `dpkernels segment --help` loads neither torch
nor MONAI.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dpkernels.segmentation.config import SegmentationConfig

if TYPE_CHECKING:
    from dpkernels.segmentation.trainer import SegmentationTrainer

__all__ = ["SegmentationConfig", "SegmentationTrainer"]


def __getattr__(name: str) -> Any:
    if name == "SegmentationTrainer":
        return importlib.import_module("dpkernels.segmentation.trainer").SegmentationTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
