"""Batches on a device: of one sample, of none, around a power of two, channels last."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.engine.device.kinds import KINDS, model_of
from tests.engine.device.models import NETWORKS, network_of
from tests.engine.device.support import autocast, backward, error_of, private, truth
from tests.engine.support import squared_loss, values
from tests.engine.truth import assert_same, microbatching, relative_error


@pytest.mark.parametrize("kind", KINDS)
def test_one_sample(kind: str, device: torch.device, full_float32: None) -> None:
    """The whole gradient is the sample's; as large as its bound allows, and half of it."""
    model, x = model_of(kind)
    x = x[:1]
    norm = float(truth(model, x, 1.0)[0].norms)
    for bound in (2.0 * norm, 0.5 * norm):
        expected, _ = truth(model, x, bound)
        made = private(model, x, device, bound)
        backward(made, x.to(device))
        assert_same(made.released(), expected, 1e-4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_sample(name: str, dtype: torch.dtype | None, device: torch.device) -> None:
    """Poisson sampling may draw nobody: noise alone is released, and the step counts."""
    model, x = network_of(name, 16, device)
    for noise in (0.0, 2.0):
        made = private(model, x, device, 0.5, noise=noise)
        backward(made, x)
        made.optimizer.zero_grad()
        with autocast(device, dtype):
            output = made.wrapped(x[:0])
        output.float().square().sum().backward()
        assert made.optimizer.last_step is None
        drawn = torch.cat([p.grad.flatten() for p in made.model.parameters()]).double()
        expected = noise * 0.5 / 16
        if noise:
            assert abs(float(drawn.std()) / expected - 1) < 6 / math.sqrt(2 * len(drawn))
        else:
            assert not drawn.any()
        made.optimizer.step()
        assert len(made.engine.accountant) == 1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_sizes_that_follow_each_other(
    name: str, dtype: torch.dtype | None, device: torch.device, full_float32: None
) -> None:
    """15, 16 and 17 samples through one private model, as Poisson sampling draws them."""
    model, x = network_of(name, 17, device)
    reference = model.double()
    whole = x.cpu().double() if x.is_floating_point() else x.cpu()
    bound = float(microbatching(reference, squared_loss, (whole,), 1.0).norms.median())
    made = private(reference.float(), x[:16], device, bound)
    for count in (15, 16, 17, 1, 16):
        made.optimizer.zero_grad()
        backward(made, x[:count], dtype)
        expected = microbatching(
            reference.double(), squared_loss, (whole[:count],), bound, expected_batch_size=16
        )
        found = made.released()
        tolerance = 1e-4 if dtype is None else 2.0**-6
        assert error_of(found, expected) < tolerance
        assert relative_error(found.norms, expected.norms) < tolerance


def images_of(conv: type[nn.Module], dims: int) -> nn.Module:
    return nn.Sequential(
        conv(3, 18, 3, padding=1), nn.GroupNorm(3, 18), nn.Tanh(), conv(18, 36, 3, stride=2),
        nn.InstanceNorm2d(36, affine=True) if dims == 2 else nn.InstanceNorm3d(36, affine=True),
        nn.Tanh(), nn.Flatten(), nn.Linear(36 * 3**dims, 5),
    )  # fmt: skip


#: by number of axes: how the network is built, its batch, the strides of channels last
LAYOUTS: dict[int, tuple[Callable[[], nn.Module], torch.Tensor, torch.memory_format]] = {
    2: (lambda: images_of(nn.Conv2d, 2), values(5, 3, 8, 7), torch.channels_last),
    3: (lambda: images_of(nn.Conv3d, 3), values(3, 3, 8, 7, 7), torch.channels_last_3d),
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dims", LAYOUTS)
def test_channels_last(
    dims: int, dtype: torch.dtype | None, device: torch.device, full_float32: None
) -> None:
    """Model and batch in the layout that convolutions on a GPU are fastest in."""
    torch.manual_seed(0)
    build, x, layout = LAYOUTS[dims]
    model = build()
    expected, bound = truth(model, x)
    x = x.float().to(device, memory_format=layout)
    made = private(model.to(memory_format=layout), x, device, bound)
    assert not x.is_contiguous()
    assert not made.model[3].weight.is_contiguous()
    backward(made, x, dtype)
    found = made.released()
    tolerance = 1e-4 if dtype is None else 2.0**-6
    assert error_of(found, expected) < tolerance
    assert relative_error(found.norms, expected.norms) < tolerance
