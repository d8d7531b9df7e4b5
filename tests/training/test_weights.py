"""Weights computed from a parameter: what they are, and that a layer may have them."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from dpkernels.training.weights import Centred, Standardised


@pytest.mark.parametrize("shape", [(4, 3, 5), (2, 3, 3, 3), (2, 1, 3, 3, 3)])
def test_filters_have_the_moments_they_promise(shape):
    weight = 3 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    axes = tuple(range(1, len(shape)))
    centred, standard = Centred()(weight), Standardised(eps=0.0)(weight)
    for filters in (centred, standard):
        torch.testing.assert_close(filters.mean(axes), torch.zeros(shape[0]), rtol=0, atol=1e-6)
    fan_in = weight[0].numel()
    expected = torch.full((shape[0],), 1 / fan_in)
    torch.testing.assert_close(standard.square().mean(axes), expected)
    torch.testing.assert_close(centred + weight.mean(axes, keepdim=True), weight)


def test_a_constant_filter_is_zero_and_not_nan():
    assert not Standardised()(torch.full((2, 3, 3), 5.0)).any()


def test_a_convolution_does_not_see_what_is_added_everywhere():
    conv = nn.Conv2d(2, 3, 3, bias=False)
    register_parametrization(conv, "weight", Centred())
    image = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(conv(image), conv(image + 5.0), rtol=0, atol=1e-5)
