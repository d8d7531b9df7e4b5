"""Networks of the presets that MONAI does not have."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

from dpkernels.training.weights import Centred


class CentredConv3d(nn.Conv3d):
    """A 3D convolution whose filters have zero mean: w - mean(w) over input channels and kernel.

    Arguments as of `nn.Conv3d`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        register_parametrization(self, "weight", Centred())


class CentredUNet(nn.Module):
    """The 3D U-Net of the paper's liver task: centred convolutions, GroupNorm, Mish, max-pooling.

    Two 3^3 convolutions per level, transposed convolutions k2 s2 upwards, skip connections by
    concatenation [Ziller et al. 2024, public code].

    Args:
        in_channels: modalities.
        out_channels: classes.
        channels: per level, from full resolution down; each step halves the axes.
        groups: of the GroupNorm; must divide every entry of `channels`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (16, 32, 64, 128, 256),
        groups: int = 8,
    ) -> None:
        super().__init__()
        for width in channels:
            if width % groups:
                raise ValueError(f"groups must divide every channel count, got {groups}, {width}")
        widths = [in_channels, *channels]
        self.down = nn.ModuleList(_double_conv(a, b, groups) for a, b in pairwise(widths))
        upward = list(channels)[::-1]
        self.raise_ = nn.ModuleList(
            nn.ConvTranspose3d(a, b, kernel_size=2, stride=2) for a, b in pairwise(upward)
        )
        self.up = nn.ModuleList(_double_conv(2 * width, width, groups) for width in upward[1:])
        self.head = nn.Conv3d(channels[0], out_channels, kernel_size=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Class scores [B, out_channels, X, Y, Z] for [B, in_channels, X, Y, Z].

        The axes must be multiples of 2 ** (len(channels) - 1).
        """
        skips = []
        x = image
        for level, block in enumerate(self.down):
            x = block(F.max_pool3d(x, 2) if level else x)
            skips.append(x)
        for raise_, block, skip in zip(self.raise_, self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([skip, raise_(x)], dim=1))
        return self.head(x)


def _double_conv(in_channels: int, out_channels: int, groups: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a in (in_channels, out_channels):
        layers += [
            CentredConv3d(a, out_channels, kernel_size=3, padding=1, bias=False),
            nn.GroupNorm(groups, out_channels),
            nn.Mish(),
        ]
    return nn.Sequential(*layers)
