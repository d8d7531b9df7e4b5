"""Losses scaled for float16 on a device, and samples whose gradients are not finite."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.engine.device.models import NETWORKS, network_of
from tests.engine.device.support import Private, autocast, backward, error_of, private, truth
from tests.engine.support import squared_loss
from tests.engine.truth import microbatching, relative_error

FLOAT16 = 2.0**-7


@pytest.mark.parametrize("name", NETWORKS)
def test_a_scaler_under_float16_autocast(name: str, device: torch.device) -> None:
    """PyTorch's own recipe: the scale is off before norms are taken, and stays as it was."""
    model, x = network_of(name, 6, device)
    expected, bound = truth(model, x)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8, growth_interval=1)
    made = private(model, x, device, bound, grad_scaler=scaler)
    before = [p.detach().clone() for p in made.model.parameters()]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not finite")
        backward(made, x, torch.float16, scaler=scaler)
    found = made.released()
    assert error_of(found, expected) < FLOAT16
    assert relative_error(found.norms, expected.norms) < FLOAT16
    scaler.step(made.optimizer)
    scaler.update()
    for p, value in zip(made.model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), value - 0.1 * p.grad)
    assert scaler.get_scale() == 2.0**8
    assert len(made.engine.accountant) == 1


def test_a_gradient_that_underflows_without_a_scaler(device: torch.device) -> None:
    tiny = 2.0**-22
    model, x = network_of("images", 6, device)
    bound = tiny * truth(model, x)[1]
    expected = microbatching(
        model.double(), lambda m, b: tiny * squared_loss(m, b), (x.cpu().double(),), bound
    )
    errors = []
    for scaler in (None, torch.amp.GradScaler(device.type, init_scale=2.0**20)):
        made = private(model.float(), x, device, bound, grad_scaler=scaler)
        with autocast(device, torch.float16):
            output = made.wrapped(x)
        loss = tiny * squared_loss(lambda _, o=output: o.float(), (x,))
        (loss if scaler is None else scaler.scale(loss)).backward()
        errors.append(error_of(made.released(), expected))
    assert errors[1] < FLOAT16 < errors[0]


def scaled_step(made: Private, x: torch.Tensor, scaler: torch.amp.GradScaler) -> None:
    backward(made, x, torch.float16, scaler=scaler)
    scaler.step(made.optimizer)


def test_a_sample_that_overflows_counts_as_zero(device: torch.device) -> None:
    """With a scaler its neighbours' sum is released, and the step is taken."""
    model, x = network_of("rows", 6, device)
    x = x / x.norm(dim=1, keepdim=True)
    others = [0, 1, 3, 4, 5]
    kept = x[others].cpu().double()
    bound = float(microbatching(model.double(), squared_loss, (kept,), 1.0).norms.median())
    expected = microbatching(model, squared_loss, (kept,), bound, expected_batch_size=6)
    x[2] *= 1e30
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8)
    made = private(model.float(), x, device, bound, grad_scaler=scaler)
    before = [p.detach().clone() for p in made.model.parameters()]
    with pytest.warns(UserWarning, match="1 of 6 samples"):
        scaled_step(made, x, scaler)
    found = made.released()
    assert made.optimizer.last_step.clip_factor[2] == 0
    assert relative_error(found.norms[others], expected.norms) < FLOAT16
    assert error_of(found, expected) < FLOAT16
    assert not any(torch.equal(p, b) for p, b in zip(made.model.parameters(), before, strict=True))


def step(made: Private, x: torch.Tensor, dtype: torch.dtype | None) -> None:
    made.optimizer.zero_grad()
    backward(made, x, dtype)
    made.optimizer.step()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["rows", "positions", "images"])
def test_a_sample_that_is_not_finite_is_refused_by_name(
    name: str, value: float, dtype: torch.dtype | None, device: torch.device
) -> None:
    """Whether backward() or step() says so, no parameter moves, and training can go on."""
    model, x = network_of(name, 5, device)
    made = private(model, x, device, 1.0)
    step(made, x, dtype)
    before = [p.detach().clone() for p in made.model.parameters()]
    spoiled = x.clone()
    spoiled[3].view(-1)[0] = value
    with pytest.raises(ValueError, match=r"sample 3 .*not finite"):
        step(made, spoiled, dtype)
    assert all(torch.equal(p, b) for p, b in zip(made.model.parameters(), before, strict=True))
    step(made, x, dtype)
    assert not any(torch.equal(p, b) for p, b in zip(made.model.parameters(), before, strict=True))
