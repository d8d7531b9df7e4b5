"""``nn.Bilinear``, a product of two inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dpkernels.layers import find_rule
from dpkernels.layers.bilinear import BilinearRule
from dpkernels.testing import assert_per_sample
from tests.engine.support import made_private, values


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_equal_to_one_sample_at_a_time(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    batch = values(4, *shape, 5), values(4, *shape, 2).cos()
    assert_per_sample(nn.Bilinear(5, 2, 3, bias=bias), None, batch)


def test_an_input_without_samples_is_refused() -> None:
    model = made_private(nn.Bilinear(5, 5, 3), values(4, 5).float())[1]
    with pytest.raises(ValueError, match="input1 of shape.*no sample axis"):
        model(torch.zeros(5), torch.zeros(5))


@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        (nn.Bilinear(2, 3, 4), BilinearRule),
    ],
)
def test_each_layer_is_served_by_its_rule(layer: nn.Module, rule: type) -> None:
    assert type(find_rule(layer)) is rule
