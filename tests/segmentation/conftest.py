from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dpkernels.segmentation.config import SegmentationConfig
from dpkernels.segmentation.phantom import write_phantom
from dpkernels.segmentation.trainer import SegmentationTrainer
from dpkernels.training.settings import merge

_TINY = {
    "data": {"shape": [16, 16, 16], "test_share": 0.25},
    "network": {
        "_target_": "monai.networks.nets.UNet",
        "spatial_dims": 3,
        "channels": [4, 8],
        "strides": [2],
        "num_res_units": 1,
        "bias": False,
    },
    "loss": {"_target_": "monai.losses.DiceCELoss", "softmax": True, "to_onehot_y": True},
    "training": {
        "steps": 3,
        "batch_size": 2,
        "device": "cpu",
        "optimizer": {"_target_": "torch.optim.NAdam", "lr": 0.005},
    },
    "privacy": {"epsilon": 8.0, "delta": 1e-5, "max_grad_norm": 0.5},
    "evaluation": {"overlays": 1},
}


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> Path:
    """Eight small phantom patients on disk. Read only: copy before changing."""
    return write_phantom(tmp_path_factory.mktemp("cohort") / "phantom", patients=8, size=20)


@pytest.fixture
def folder(cohort, tmp_path) -> Path:
    """A private copy of the cohort, to be damaged."""
    return Path(shutil.copytree(cohort, tmp_path / "data"))


@pytest.fixture
def tiny(cohort):
    """`tiny(change)`: a configuration that trains in about a second."""

    def make(change: dict | None = None, root: Path = cohort) -> SegmentationConfig:
        values = merge(_TINY, {"data": {"root": str(root)}})
        return SegmentationConfig.from_dict(merge(values, change or {}))

    return make


@pytest.fixture
def manifest():
    """`manifest(folder, change)`: apply `change` to the parsed dataset.json of a folder."""

    def edit(folder: Path, change) -> None:
        path = folder / "dataset.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return edit


@pytest.fixture
def rewrite():
    """`rewrite(path, array, affine)`: replace parts of a NIfTI file."""

    def write(path: Path, change=lambda array: array, affine=None) -> None:
        image = nib.load(path)
        array = change(np.asanyarray(image.dataobj).copy())
        nib.save(nib.Nifti1Image(array, image.affine if affine is None else affine), path)

    return write


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """One finished run on six phantom patients, used read only."""
    root = tmp_path_factory.mktemp("runs")
    values = {
        "data": {
            "shape": [16, 16, 16],
            "test_share": 0.34,
            "validation_share": 0.17,
            "phantom": {"patients": 6, "size": 20},
        },
        "network": {
            "_target_": "monai.networks.nets.UNet",
            "spatial_dims": 3,
            "channels": [4, 8],
            "strides": [2],
        },
        "loss": {"_target_": "monai.losses.DiceCELoss", "softmax": True, "to_onehot_y": True},
        "training": {"steps": 3, "batch_size": 2, "ema_decay": 0.9, "validate_every": 2},
        "evaluation": {"overlays": 1},
    }
    SegmentationTrainer(SegmentationConfig.from_dict(values), root / "run").fit()
    return root / "run"
