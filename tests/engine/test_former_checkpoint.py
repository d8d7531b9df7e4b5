"""A checkpoint that a former version of the package wrote goes on in this one.

``checkpoints/before_rooms.pt`` was written at commit 0cba9a8, before the engine was divided into
rooms, by ``made(1.0, 1.0)`` below (with noise from ``torch.Generator().manual_seed(1)``), three
steps over four records each (``X[0:4]``, ``X[4:8]``, ``X[8:12]``) with a ``step()`` of both
schedulers after each, and ``engine.save_checkpoint()``.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from opacus.schedulers import ExponentialGradClip, ExponentialNoise
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine
from tests.engine.truth import microbatching

FILE = Path(__file__).parent / "checkpoints" / "before_rooms.pt"
X = torch.linspace(-1.0, 1.0, 60).reshape(20, 3)
HISTORY = [(1.0, 0.2, 1), (1.5, 0.2, 1), (2.25, 0.2, 1)]
EPSILON = 2.5481636693623715
MOMENTUM, LEARNING_RATE = 0.9, 0.1


def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return model(batch[0]).square().sum(1).mean()


def made(noise_multiplier: float, max_grad_norm: float) -> tuple:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    engine = PrivacyEngine()
    model, optimizer, _ = engine.make_private(
        module=net, optimizer=torch.optim.SGD(net.parameters(), LEARNING_RATE, MOMENTUM),
        data_loader=DataLoader(TensorDataset(X), batch_size=4), noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
    )  # fmt: skip
    schedulers = {
        "noise_scheduler": ExponentialNoise(optimizer, gamma=1.5),
        "grad_clip_scheduler": ExponentialGradClip(optimizer, gamma=0.5),
    }
    return engine, net, model, optimizer, schedulers


def test_training_goes_on_from_a_checkpoint_of_a_former_version() -> None:
    """Without noise of its own, so that one more step is known exactly."""
    engine, net, model, optimizer, schedulers = made(0.0, 0.125)
    engine.load_checkpoint(path=FILE, module=model, optimizer=optimizer, **schedulers)
    assert engine.accountant.history == HISTORY
    assert engine.get_epsilon(1e-5) == pytest.approx(EPSILON, rel=1e-9)
    for scheduler in schedulers.values():
        assert scheduler.last_epoch == 3
    momentum = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    sums = [float(each.sum()) for each in momentum]
    assert sums == pytest.approx([-1.310212, 0.040450, 0.381659, -0.647009], abs=1e-6)
    before = [p.detach().clone() for p in net.parameters()]
    sums = [float(each.sum()) for each in before]
    assert sums == pytest.approx([-0.098825, -1.170083, 0.806244, 0.053487], abs=1e-6)
    expected = microbatching(net, loss, (X[12:16],), 0.125, expected_batch_size=4).gradients

    loss(model, (X[12:16],)).backward()
    optimizer.step()
    assert engine.accountant.history == [*HISTORY, (0.0, 0.2, 1)]
    for p, old, mean, gradient in zip(
        net.parameters(), before, momentum, expected.values(), strict=True
    ):
        moved = old - LEARNING_RATE * (MOMENTUM * mean + gradient)
        torch.testing.assert_close(p.detach(), moved, rtol=1e-5, atol=1e-6)


def test_epsilon_goes_on_from_a_checkpoint_of_a_former_version() -> None:
    """A step with noise adds to what was spent before."""
    engine, _, model, optimizer, schedulers = made(1.0, 1.0)
    engine.load_checkpoint(path=FILE, module=model, optimizer=optimizer, **schedulers)
    loss(model, (X[12:16],)).backward()
    optimizer.step()
    assert engine.accountant.history == [*HISTORY, (1.0, 0.2, 1)]
    other = PrivacyEngine()
    other.accountant.history = [*HISTORY, (1.0, 0.2, 1)]
    assert engine.get_epsilon(1e-5) == other.get_epsilon(1e-5) > EPSILON


def test_a_checkpoint_names_no_class_of_the_package(tmp_path: Path) -> None:
    """Tensors and plain values alone, so that classes may move."""
    engine, _, model, optimizer, schedulers = made(1.0, 1.0)
    loss(model, (X[:4],)).backward()
    optimizer.step()
    path = tmp_path / "checkpoint.pt"
    engine.save_checkpoint(path=path, module=model, optimizer=optimizer, **schedulers)
    for each in (FILE, path):
        torch.load(each, weights_only=True)
        with zipfile.ZipFile(each) as file:
            (pickled,) = (n for n in file.namelist() if n.endswith("data.pkl"))
            assert b"dpkernels" not in file.read(pickled)
