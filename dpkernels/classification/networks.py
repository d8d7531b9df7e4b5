"""The residual network of the published study's two classification tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

from dpkernels.training.weights import Standardised


class ResNet9(nn.Module):
    """Nine layers: weight-standardised convolutions, GroupNorm, Mish, two residual blocks.

    [Klause et al. 2022, "Differentially private training of residual networks with scale
    normalisation"; Ziller et al. 2024]

    Args:
        in_channels: of the image.
        out_channels: classes.
        channels: of the four convolutions outside the residual blocks; all but the first halve
            the image.
        groups: of the GroupNorm; must divide every entry of `channels`.

    Raises:
        ValueError: `channels` or `groups` do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (64, 128, 256, 256),
        groups: int = 32,
    ) -> None:
        super().__init__()
        if len(channels) != 4 or any(width % groups for width in channels):
            raise ValueError(
                f"channels must be four multiples of groups={groups}, got {list(channels)}"
            )
        a, b, c, d = channels
        self.stem = nn.Sequential(
            _convolution(in_channels, a, groups), _convolution(a, b, groups), nn.MaxPool2d(2)
        )
        self.first = nn.Sequential(_convolution(b, b, groups), _convolution(b, b, groups))
        self.middle = nn.Sequential(
            _convolution(b, c, groups), nn.MaxPool2d(2), _convolution(c, d, groups), nn.MaxPool2d(2)
        )
        self.second = nn.Sequential(_convolution(d, d, groups), _convolution(d, d, groups))
        self.head = nn.Linear(4 * d, out_channels)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Class scores [B, out_channels] for [B, in_channels, H, W], H and W at least 8."""
        x = self.stem(image)
        x = self.middle(x + self.first(x))
        x = x + self.second(x)
        return self.head(F.adaptive_max_pool2d(x, 2).flatten(1))


def _convolution(in_channels: int, out_channels: int, groups: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    register_parametrization(convolution, "weight", Standardised())
    return nn.Sequential(convolution, nn.Mish(), nn.GroupNorm(groups, out_channels))
