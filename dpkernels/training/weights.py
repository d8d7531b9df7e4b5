"""Weights that are a function of a parameter, for ``torch.nn.utils.parametrize``.

The engine gives a layer with such a weight its ordinary rule, as
`dpkernels.engine.capture.computed_weight` tells.
"""

from __future__ import annotations

import torch
from torch import nn


class Centred(nn.Module):
    """Filters with zero mean over input channels and kernel."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """[Cout, Cin, *k] -> the same, each filter minus its mean."""
        return weight - weight.mean(dim=tuple(range(1, weight.ndim)), keepdim=True)


class Standardised(nn.Module):
    """Filters with zero mean and unit variance, scaled by 1 / sqrt(fan in).

    [Qiao et al. 2019, "Micro-batch training with batch-channel normalization and weight
    standardization"; scaled so that a convolution keeps the variance of its input]

    Args:
        eps: added to the variance.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """[Cout, Cin, *k] -> the same, each filter standardised."""
        axes = tuple(range(1, weight.ndim))
        variance, mean = torch.var_mean(weight, dim=axes, keepdim=True, correction=0)
        fan_in = weight[0].numel()
        return (weight - mean) * torch.rsqrt(fan_in * (variance + self.eps))
