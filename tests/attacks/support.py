"""Records that attacks go for, and a user's model that stands in their way."""

from __future__ import annotations

import torch
from torch import nn

from dpkernels.attacks.gradient import LossOfOutput


def records(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """Smooth blobs in [0, 1] of different brightness."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, *[max(2, n // 4) for n in shape], generator=generator)
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    bright = torch.linspace(0.3, 1.0, count).reshape(-1, *[1] * (len(shape) + 1))
    return bright * nn.functional.interpolate(coarse, size=shape, mode=mode)


def users_model(dims: int) -> nn.Module:
    torch.manual_seed(0)
    conv, pool = (
        (nn.Conv2d, nn.AdaptiveAvgPool2d) if dims == 2 else (nn.Conv3d, nn.AdaptiveAvgPool3d)
    )
    return nn.Sequential(
        conv(1, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Sigmoid(), pool(4), nn.Flatten(),
        nn.Linear(6 * 4**dims, 3),
    )  # fmt: skip


def users_loss(count: int) -> LossOfOutput:
    target = torch.arange(count) % 3
    return lambda output: nn.functional.cross_entropy(output, target)
