"""Named starting points. A preset is plain data: everything in it can be overridden."""

from __future__ import annotations

from typing import Any

_DICE_CE = {
    "_target_": "monai.losses.DiceCELoss",
    "softmax": True,
    "to_onehot_y": True,
}

PHANTOM: dict[str, Any] = {
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
        "optimizer": {"_target_": "torch.optim.NAdam", "lr": 5e-3},
    },
    "privacy": {"epsilon": 8.0, "delta": 1e-5, "max_grad_norm": 0.5},
}

PRESETS: dict[str, dict[str, Any]] = {"phantom": PHANTOM}


def preset(name: str) -> dict[str, Any]:
    """The preset's nested dictionaries.

    Raises:
        ValueError: no preset of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]
