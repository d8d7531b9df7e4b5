"""Normalisations and learned activations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dpkernels.layers import find_rule
from dpkernels.layers.norm import GroupNormRule, LayerNormRule, PReLURule
from dpkernels.testing import assert_per_sample
from tests.engine.support import values


def without_bias(norm: nn.Module) -> nn.Module:
    norm.register_parameter("bias", None)
    return norm


def frozen_scale(norm: nn.Module) -> nn.Module:
    norm.weight.requires_grad_(False)
    return norm


class NormalisedWindows(nn.Module):
    """Two windows a sample are rows of norms, one of them used twice and under a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GroupNorm(1, 3)
        self.second = nn.InstanceNorm1d(3, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.reshape(-1, 3, x.shape[2])).square()
        x = checkpoint(self.second, x, use_reentrant=False).tanh()
        return self.first(x).reshape(-1, 6, x.shape[2])


CASES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "group-norm": (lambda: nn.GroupNorm(2, 6), values(4, 6, 5, 3)),
    "group-norm-no-space": (lambda: nn.GroupNorm(2, 6), values(4, 6)),
    "instance-norm": (lambda: nn.InstanceNorm2d(3, affine=True), values(4, 3, 5, 4)),
    "group-norm-no-bias": (lambda: without_bias(nn.GroupNorm(2, 6)), values(4, 6, 5)),
    "group-norm-transposed": (lambda: nn.GroupNorm(3, 6), values(4, 5, 6).transpose(1, 2)),
    "instance-norm-channels-last": (
        lambda: nn.InstanceNorm2d(6, affine=True),
        values(4, 6, 5, 3).contiguous(memory_format=torch.channels_last),
    ),
    "norm-frozen-scale": (lambda: frozen_scale(nn.GroupNorm(2, 6)), values(4, 6, 5, 3)),
    "norms-of-windows": (NormalisedWindows, values(4, 6, 5)),
    "layer-norm": (lambda: nn.LayerNorm((3, 4)), values(4, 2, 3, 4)),
    "rms-norm": (lambda: nn.RMSNorm(5), values(4, 2, 5)),
    "prelu": (lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU()), values(4, 3, 4)),
    "prelu-channels": (lambda: nn.PReLU(3), values(4, 3, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_one_sample_at_a_time(name: str) -> None:
    torch.manual_seed(0)
    build, x = CASES[name]
    assert_per_sample(build(), None, (x,))


@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        (nn.GroupNorm(2, 4), GroupNormRule),
        (nn.InstanceNorm3d(2, affine=True), GroupNormRule),
        (nn.LayerNorm(4), LayerNormRule),
        (nn.RMSNorm(4), LayerNormRule),
        (nn.PReLU(3), PReLURule),
    ],
)
def test_each_layer_is_served_by_its_rule(layer: nn.Module, rule: type) -> None:
    assert type(find_rule(layer)) is rule
