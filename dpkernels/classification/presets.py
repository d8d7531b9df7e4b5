"""Named starting points. A preset is plain data: everything in it can be overridden."""

from __future__ import annotations

from typing import Any

_RESNET = "dpkernels.classification.networks.ResNet9"

_TURNS = [{"_target_": "dpkernels.training.augment.RandTurnd", "keys": "image"}]

_SYNTHETIC: dict[str, Any] = {
    "data": {
        "size": 24,
        "positive": ["akiec", "bcc", "mel"],
        "augmentations": _TURNS,
    },
    "network": {"_target_": _RESNET, "channels": [8, 16, 16, 16], "groups": 4},
    "training": {
        "steps": 150,
        "batch_size": 64,
        "optimizer": {"_target_": "torch.optim.NAdam", "lr": 5e-3},
        "ema_decay": 0.9,
    },
    "privacy": {"epsilon": 8.0, "delta": 1e-4, "max_grad_norm": 1.0},
}

# The published study on HAM10000: a binary task, 100 epochs, batches of 2048, C = 9. Which of the
# seven classes make up each side is our choice: malignant or on the way there (actinic keratoses,
# basal cell carcinoma, melanoma) against the benign bkl, df, nv and vasc.
_HAM10000: dict[str, Any] = {
    "data": {
        "layout": "ham10000",
        "size": 224,
        "positive": ["akiec", "bcc", "mel"],
        "augmentations": _TURNS,
    },
    "network": {"_target_": _RESNET},
    "training": {
        "steps": 300,
        "batch_size": 2048,
        "physical_batch_size": 16,
        "optimizer": {"_target_": "torch.optim.NAdam", "lr": 2e-3},
    },
    "privacy": {"epsilon": 8.0, "delta": 1e-5, "max_grad_norm": 9.0},
}

# The published study on RadImageNet: 165 classes, 50 epochs, batches of 3328, C = 5.66.
_RADIMAGENET: dict[str, Any] = {
    "data": {
        "layout": "table",
        "size": 224,
        "channels": 1,
        "augmentations": _TURNS,
        "cache": "none",
    },
    "network": {"_target_": _RESNET},
    "training": {
        "steps": 16_300,
        "batch_size": 3328,
        "physical_batch_size": 16,
        "optimizer": {"_target_": "torch.optim.NAdam", "lr": 2e-3},
    },
    "privacy": {"epsilon": 8.0, "delta": 8e-7, "max_grad_norm": 5.66},
}

PRESETS: dict[str, dict[str, Any]] = {
    "synthetic": _SYNTHETIC,
    "ham10000": _HAM10000,
    "radimagenet": _RADIMAGENET,
}
