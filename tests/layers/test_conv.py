"""Convolutions and transposed convolutions: every padding, stride, dilation and group."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dpkernels.layers import find_rule
from dpkernels.layers.conv import ConvRule, ConvTransposeRule
from dpkernels.testing import assert_per_sample
from tests.engine.support import values


def conv(
    dims: int, cin: int, cout: int, *args: object, transposed: bool = False, **kwargs: object
) -> nn.Module:
    kind = ("ConvTranspose" if transposed else "Conv") + f"{dims}d"
    return getattr(nn, kind)(cin, cout, *args, **kwargs)


CASES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "conv1d": (lambda: conv(1, 3, 4, 3, stride=2, padding=1, dilation=2), values(4, 3, 17)),
    "conv2d-groups": (lambda: conv(2, 4, 6, 3, groups=2), values(4, 4, 7, 8)),
    "conv2d-depthwise": (lambda: conv(2, 4, 8, 3, groups=4, padding=1), values(4, 4, 5, 6)),
    "conv2d-remainder": (lambda: conv(2, 2, 3, 3, stride=3), values(4, 2, 8, 10)),
    "conv2d-asymmetric": (lambda: conv(2, 2, 3, (1, 4), padding=(0, 2)), values(4, 2, 5, 6)),
    "conv2d-same-even": (lambda: conv(2, 2, 3, (2, 4), padding="same"), values(4, 2, 5, 6)),
    "conv2d-valid": (lambda: conv(2, 2, 3, 3, padding="valid"), values(4, 2, 5, 6)),
    "conv2d-circular": (
        lambda: conv(2, 2, 3, 3, padding=1, padding_mode="circular"),
        values(4, 2, 5, 6),
    ),
    "conv2d-reflect": (
        lambda: conv(2, 2, 3, 3, padding=2, padding_mode="reflect"),
        values(4, 2, 5, 6),
    ),
    "conv2d-replicate": (
        lambda: conv(2, 2, 3, 3, padding=1, stride=2, padding_mode="replicate"),
        values(4, 2, 5, 6),
    ),
    "conv2d-channels-last": (
        lambda: conv(2, 3, 4, 3),
        values(4, 3, 6, 7).contiguous(memory_format=torch.channels_last),
    ),
    "conv3d": (lambda: conv(3, 2, 3, 3, padding=1), values(3, 2, 5, 4, 6)),
    "conv3d-one-channel": (lambda: conv(3, 1, 1, 1), values(3, 1, 3, 3, 3)),
    "conv3d-stride": (lambda: conv(3, 2, 3, 3, stride=2, padding=1), values(3, 2, 5, 4, 6)),
    "transposed1d": (lambda: conv(1, 3, 4, 3, stride=2, transposed=True), values(4, 3, 6)),
    "transposed2d-output-padding": (
        lambda: conv(2, 4, 6, 3, stride=3, padding=1, output_padding=2, groups=2, transposed=True),
        values(4, 4, 4, 3),
    ),
    "transposed3d": (
        lambda: conv(3, 3, 2, 3, stride=2, padding=1, output_padding=1, transposed=True),
        values(3, 3, 3, 2, 4),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_one_sample_at_a_time(name: str) -> None:
    torch.manual_seed(0)
    build, x = CASES[name]
    assert_per_sample(build(), None, (x,))


@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        (nn.Conv1d(2, 3, 2), ConvRule),
        (nn.Conv3d(2, 2, 3, groups=2), ConvRule),
        (nn.ConvTranspose2d(2, 3, 2), ConvTransposeRule),
    ],
)
def test_each_layer_is_served_by_its_rule(layer: nn.Module, rule: type) -> None:
    assert type(find_rule(layer)) is rule
