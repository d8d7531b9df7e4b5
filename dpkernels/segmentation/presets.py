"""Named starting points. A preset is plain data: everything in it can be overridden."""

from __future__ import annotations

from typing import Any

_DICE_CE = {
    "_target_": "monai.losses.DiceCELoss",
    "softmax": True,
    "to_onehot_y": True,
}

_PHANTOM: dict[str, Any] = {
    "data": {"shape": [32, 32, 32]},
    "network": {
        "_target_": "monai.networks.nets.UNet",
        "spatial_dims": 3,
        "channels": [8, 16, 32],
        "strides": [2, 2],
        "num_res_units": 1,
        "bias": False,
    },
    "loss": _DICE_CE,
    "training": {
        "steps": 100,
        "batch_size": 16,
        "optimizer": {"_target_": "torch.optim.NAdam", "lr": 1e-2},
        "ema_decay": 0.9,
    },
    "privacy": {"epsilon": 8.0, "delta": 1e-5, "max_grad_norm": 0.5},
}

# Many small steps: at a nominal budget the noise rises with the number of steps, and a phantom has
# few voxels to spread it over; the published study took 53,000 steps with one patient each. Few
# patients (48 to train on), so that a budget of 1 leaves too little signal, as it did there.
_PHANTOM_STUDY: dict[str, Any] = {
    **_PHANTOM,
    "data": {**_PHANTOM["data"], "phantom": {"patients": 64}, "test_share": 0.25},
    "training": {**_PHANTOM["training"], "steps": 600, "batch_size": 2},
    "evaluation": {"surface_distance": False, "overlays": 1},
}

_MSD_LIVER: dict[str, Any] = {
    "data": {
        "shape": [128, 128, 50],
        "window": [-150.0, 200.0],
        "test_share": 13 / 131,
        "validation_share": 12 / 131,
    },
    "network": {
        "_target_": "dpkernels.segmentation.networks.CentredUNet",
        "channels": [16, 32, 64, 128, 256],
    },
    "loss": {
        "_target_": "monai.losses.DiceLoss",
        "softmax": True,
        "to_onehot_y": True,
        "include_background": True,
    },
    "training": {
        "steps": 53_000,
        "batch_size": 1,
        "physical_batch_size": 1,
        "optimizer": {"_target_": "torch.optim.NAdam", "lr": 2e-3},
        "validate_every": 1060,
    },
    "privacy": {"epsilon": 8.0, "delta": 8e-7, "max_grad_norm": 0.046},
}

_MSD_LIVER_FAST: dict[str, Any] = {
    "data": {
        "spacing": [2.0, 2.0, 2.0],
        "crop": [96, 96, 96],
        "foreground_share": 0.67,
        "views_per_patient": 2,
        "window": [-150.0, 200.0],
        "augmentations": [
            {
                "_target_": "monai.transforms.RandScaleIntensityd",
                "keys": "image",
                "factors": 0.1,
                "prob": 0.5,
            },
            {
                "_target_": "monai.transforms.RandGaussianNoised",
                "keys": "image",
                "std": 0.03,
                "prob": 0.3,
            },
        ],
    },
    "network": {
        "_target_": "monai.networks.nets.DynUNet",
        "spatial_dims": 3,
        "kernel_size": [3, 3, 3, 3, 3],
        "strides": [1, 2, 2, 2, 2],
        "upsample_kernel_size": [2, 2, 2, 2],
        "filters": [16, 32, 64, 128, 256],
        "norm_name": ["GROUP", {"num_groups": 8}],
    },
    "loss": _DICE_CE,
    "training": {
        "steps": 3_000,
        "batch_size": 8,
        "physical_batch_size": 2,
        "optimizer": {"_target_": "torch.optim.NAdam", "lr": 2e-3},
        "schedule": "cosine",
        "ema_decay": 0.99,
        "precision": "bfloat16",
    },
    "privacy": {"epsilon": 8.0, "delta": 8e-7, "max_grad_norm": 0.05},
}

PRESETS: dict[str, dict[str, Any]] = {
    "phantom": _PHANTOM,
    "phantom-study": _PHANTOM_STUDY,
    "msd-liver": _MSD_LIVER,
    "msd-liver-fast": _MSD_LIVER_FAST,
}
