from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dpkernels.classification.config import ClassificationConfig
from dpkernels.classification.synthetic import write_synthetic
from dpkernels.training.settings import merge

_TINY = {
    "data": {"size": 16, "test_share": 0.25, "views_per_patient": 2, "positive": ["mel", "bcc"]},
    "network": {
        "_target_": "dpkernels.classification.networks.ResNet9",
        "channels": [4, 4, 4, 4],
        "groups": 2,
    },
    "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
    "training": {"steps": 3, "batch_size": 6, "device": "cpu"},
    "privacy": {"epsilon": 8.0, "delta": 1e-3, "max_grad_norm": 0.5},
}


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def lesions(tmp_path_factory) -> Path:
    """Forty synthetic lesions in the layout of HAM10000. Read only: copy before changing."""
    return write_synthetic(tmp_path_factory.mktemp("lesions") / "ham", lesions=40, size=16)


@pytest.fixture
def folder(lesions, tmp_path) -> Path:
    """A private copy of the lesions, to be damaged."""
    return Path(shutil.copytree(lesions, tmp_path / "data"))


@pytest.fixture
def tiny(lesions):
    """`tiny(change)`: a configuration that trains in about a second."""

    def make(change: dict | None = None, root: Path = lesions) -> ClassificationConfig:
        values = merge(_TINY, {"data": {"root": str(root)}})
        return ClassificationConfig.from_dict(merge(values, change or {}))

    return make
