"""The mechanism: bound, noise, and what is counted."""

from __future__ import annotations

import math

import pytest
import torch
from opacus.schedulers import ExponentialGradClip, ExponentialNoise
from torch import nn

from tests.engine.support import (
    made_private,
    squared_loss,
    step,
    values,
)
from tests.engine.truth import microbatching


@pytest.mark.parametrize(("bound", "noise"), [(0.5, 1.0), (1.0, 3.0)])
def test_schedulers_move_clip_and_noise_together(bound: float, noise: float) -> None:
    torch.manual_seed(0)
    x = values(4, 50).float() * 100
    model = nn.Linear(50, 100)
    engine, wrapped, optimizer, _ = made_private(model, x, noise=noise, max_grad_norm=bound)
    clip, sigma = ExponentialGradClip(optimizer, gamma=0.1), ExponentialNoise(optimizer, gamma=2.0)
    step(wrapped, optimizer, x)
    clip.step()
    sigma.step()
    optimizer.zero_grad()
    squared_loss(wrapped, (x,)).backward()
    report = optimizer.last_step
    torch.testing.assert_close(
        report.clip_factor * report.per_sample_norm, torch.full((4,), bound / 10)
    )
    optimizer.step()
    assert [entry[0] for entry in engine.accountant.history] == [noise, 2 * noise]
    optimizer.zero_grad()
    optimizer.make_private_noise_only()
    expected = 2 * noise * bound / 10 / 4
    assert abs(float(model.weight.grad.std()) / expected - 1) < 5 / math.sqrt(2 * 5000)


def test_the_mechanism_that_is_counted_is_the_one_that_was_drawn() -> None:
    x = values(4, 5).float()
    _, model, optimizer, _ = made_private(nn.Linear(5, 3), x, noise=1.0)
    squared_loss(model, (x,)).backward()
    optimizer.noise_multiplier = 2.0
    with pytest.raises(ValueError, match="noise_multiplier=2.0.*drawn in backward"):
        optimizer.step()
    _, model, optimizer, _ = made_private(nn.Linear(5, 3), x, noise=1.0, poisson_sampling=False)
    squared_loss(model, (x,)).backward()
    optimizer.max_grad_norm = 2.0
    with pytest.raises(ValueError, match="max_grad_norm=2.0.*drew the noise"):
        squared_loss(model, (x,)).backward()


def test_a_noise_multiplier_set_while_accumulating_is_not_counted() -> None:
    """The first backward pass draws the noise; the second must not pass for the one that did."""
    x = values(4, 5).float()
    engine, model, optimizer, _ = made_private(
        nn.Linear(5, 3), x, noise=1.0, poisson_sampling=False
    )
    squared_loss(model, (x,)).backward()
    optimizer.noise_multiplier = 2.0

    def goes_on() -> None:
        squared_loss(model, (x,)).backward()
        optimizer.step()

    with pytest.raises(ValueError, match="noise_multiplier"):
        goes_on()
    assert engine.accountant.history == []


def test_the_largest_bound_of_a_logical_batch_rules_its_noise() -> None:
    x = values(4, 50).float()
    model = nn.Linear(50, 100)
    _, wrapped, optimizer, _ = made_private(model, x * 100, noise=1000.0)
    optimizer.signal_skip_step(True)
    optimizer.signal_skip_step(False)
    step(wrapped, optimizer, x)
    optimizer.max_grad_norm = 0.01
    optimizer.zero_grad()
    squared_loss(wrapped, (x,)).backward()
    assert abs(float(model.weight.grad.std()) * 4 / 1000 - 1) < 0.1


def test_a_skip_signal_after_backward_is_refused() -> None:
    x = values(4, 5).float()
    _, model, optimizer, _ = made_private(nn.Linear(5, 3), x, noise=1.0)
    squared_loss(model, (x,)).backward()
    optimizer.signal_skip_step()
    with pytest.raises(ValueError, match="signal_skip_step.*after backward"):
        optimizer.step()


def test_per_layer_clipping_and_its_noise() -> None:
    torch.manual_seed(0)
    bounds = [3.0, 4.0, 12.0]
    model = nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 30, bias=False))
    x = values(4, 50).float() * 100
    _, wrapped, optimizer, _ = made_private(model, x, 0.0, bounds, clipping="per_layer")
    squared_loss(wrapped, (x[:1],)).backward()
    norms = [float(p.summed_grad.norm()) for p in model.parameters()]
    assert norms == pytest.approx([min(c, n) for c, n in zip(bounds, norms)], rel=1e-4)
    assert optimizer.max_grad_norm == pytest.approx(13.0)
    ExponentialGradClip(optimizer, gamma=0.5).step()
    optimizer.zero_grad()
    squared_loss(wrapped, (x[:1],)).backward()
    halves = [float(p.summed_grad.norm()) for p in model.parameters()]
    assert all(h <= c / 2 * (1 + 1e-5) for h, c in zip(halves, bounds))
    wrapped.to_standard_module()
    _, wrapped, optimizer, _ = made_private(model, x, 2.0, bounds, clipping="per_layer")
    optimizer.make_private_noise_only()
    for p in model.parameters():
        error = 6 / math.sqrt(2 * p.numel())
        assert abs(float(p.grad.std()) * 4 / (2.0 * 13.0) - 1) < error


ADAPTIVE = {
    "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "max_clipbound": 1e3,
    "min_clipbound": 1e-3, "unclipped_num_std": 1.0,
}  # fmt: skip


def test_adaptive_clipping_follows_the_quantile() -> None:
    torch.manual_seed(0)
    x = values(64, 5).float()
    model = nn.Linear(5, 3)
    _, wrapped, optimizer, _ = made_private(
        model, x, 0.0, 100.0, clipping="adaptive", poisson_sampling=False, **ADAPTIVE
    )
    norms = microbatching(model, squared_loss, (x,), 1.0).norms
    for _ in range(80):
        optimizer.zero_grad()
        squared_loss(wrapped, (x,)).backward()
        model.zero_grad(set_to_none=False)
        optimizer.step()
    inside = float((norms <= optimizer.max_grad_norm).float().mean())
    assert 0.35 < inside < 0.65


def test_adaptive_clipping_spends_the_rest_on_the_gradient() -> None:
    model = nn.Linear(100, 100)
    _, _, optimizer, _ = made_private(
        model, values(4, 100).float(), 1.0, 2.0, clipping="adaptive", **ADAPTIVE
    )
    optimizer.make_private_noise_only()
    expected = (1.0 - 2.0**-2) ** -0.5 * 2.0 / 4
    assert abs(float(model.weight.grad.std()) / expected - 1) < 6 / math.sqrt(2 * 1e4)
    settings = {k: v for k, v in ADAPTIVE.items() if k != "unclipped_num_std"}
    with pytest.raises(ValueError, match="needs unclipped_num_std"):
        made_private(nn.Linear(100, 100), values(4, 100), 1.0, 2.0, clipping="adaptive", **settings)
    with pytest.raises(ValueError, match="smaller than 2 \\* unclipped_num_std"):
        made_private(nn.Linear(100, 100), values(4, 100), 2.0, 2.0, clipping="adaptive", **ADAPTIVE)


def test_bounds_that_do_not_fit_the_clipping_are_refused() -> None:
    x = values(4, 5).float()
    with pytest.raises(ValueError, match="2 trained parameters, got 3"):
        made_private(nn.Linear(5, 3), x, 1.0, [1.0, 1.0, 1.0], clipping="per_layer")
    with pytest.raises(ValueError, match="clipping='per_layer'"):
        made_private(nn.Linear(5, 3), x, 1.0, [1.0, 1.0])
    with pytest.raises(ValueError, match="unexpected argument 'materialise_grad_samples'"):
        made_private(nn.Linear(5, 3), x, materialise_grad_samples=True)


def test_noise_is_not_drawn_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("noise from torch's generator")

    model = nn.Linear(100, 50).bfloat16()
    x = values(4, 100).bfloat16()
    _, _, optimizer, _ = made_private(model, x, noise=3.0)
    monkeypatch.setattr(torch, "normal", refuse)
    torch.manual_seed(0)
    optimizer.make_private_noise_only()
    first = model.weight.grad.clone()
    optimizer.zero_grad()
    torch.manual_seed(0)
    optimizer.make_private_noise_only()
    assert not torch.equal(first, model.weight.grad)
    assert abs(float(first.float().std()) * 4 / 3 - 1) < 6 / math.sqrt(2 * 5000)


def test_clip_factors_are_float32_and_sound_in_half_precision() -> None:
    torch.manual_seed(0)
    x = (values(64, 40) * 30).bfloat16()
    _, model, optimizer, _ = made_private(nn.Linear(40, 10).bfloat16(), x)
    squared_loss(model, (x,)).backward()
    report = optimizer.last_step
    assert report.clip_factor.dtype == torch.float32
    assert (report.clip_factor.double() * report.per_sample_norm.double() <= 1.0 + 1e-7).all()
    assert all(p.summed_grad.dtype == torch.float32 for p in model.parameters())
