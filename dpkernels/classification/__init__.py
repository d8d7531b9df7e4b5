"""Image classification with differential privacy per patient: trainer, commands, synthetic data.

The trainer's class is found on first use, so that `dpkernels classify --help` loads neither torch
nor MONAI.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dpkernels.classification.config import ClassificationConfig

if TYPE_CHECKING:
    from dpkernels.classification.trainer import ClassificationTrainer

__all__ = ["ClassificationConfig", "ClassificationTrainer"]


def __getattr__(name: str) -> Any:
    if name == "ClassificationTrainer":
        return importlib.import_module("dpkernels.classification.trainer").ClassificationTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
