"""Image classification with differential privacy per patient: trainer, commands, synthetic data.

The names below resolve on first use, so that `dpkernels classify --help` loads neither torch nor
MONAI.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpkernels.classification.config import ClassificationConfig
    from dpkernels.classification.trainer import ClassificationTrainer

__all__ = ["ClassificationConfig", "ClassificationTrainer"]

_HOME = {
    "ClassificationConfig": "dpkernels.classification.config",
    "ClassificationTrainer": "dpkernels.classification.trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
