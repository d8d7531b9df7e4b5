"""A model on another GPU than the current one."""

from __future__ import annotations

import pytest
import torch

from tests.engine.device.kinds import model_of
from tests.engine.device.models import NETWORKS, network_of
from tests.engine.device.support import backward, private, truth
from tests.engine.truth import assert_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("placed", [0, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_on_one_device_while_another_is_current(
    name: str, placed: int, current: int, full_float32: None
) -> None:
    model, x = network_of(name, 6, torch.device("cpu"))
    expected, bound = truth(model, x)
    device = torch.device("cuda", placed)
    with torch.cuda.device(current):
        made = private(model, x.to(device), device, bound)
        backward(made, x.to(device))
        assert_same(made.released(), expected, 1e-4)
        assert all(p.grad.device == device for p in made.model.parameters())
        made.optimizer.step()
        noisy = private(model, x.to(device), device, bound, noise=1.0)
        backward(noisy, x.to(device))
        assert all(p.grad.isfinite().all() for p in noisy.model.parameters())
        assert torch.cuda.current_device() == current


def test_a_model_on_two_devices(full_float32: None) -> None:
    """Layers on one GPU each: norms of all of them count."""
    model, x = model_of("linear-short")
    model = torch.nn.Sequential(model, torch.nn.Tanh(), torch.nn.Linear(36, 7))
    expected, bound = truth(model, x)

    class Split(torch.nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[2](self[1](self[0](x.to("cuda:0"))).to("cuda:1"))

    split = Split(*model)
    made = private(split, x, torch.device("cpu"), bound)
    made.model[0].to("cuda:0")
    made.model[2].to("cuda:1")
    backward(made, x.to("cuda:0"))
    assert_same(made.released(), expected, 1e-4)
