"""The same inputs, key and plan give the same bits on a device, by every strategy.

PyTorch's own deterministic algorithms are on, as its layers' backward passes need them; tests of
networks whose layers need none run without them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dpkernels.engine.plan.planner import Entry, Planner
from dpkernels.ops.noise import NoiseSource
from tests.engine.device.kinds import encoder, recurrent
from tests.engine.device.models import network_of
from tests.engine.device.support import Private, backward, private
from tests.engine.support import values
from tests.engine.truth import Released


@pytest.fixture
def fixed_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(self: NoiseSource) -> None:
        self._key, self._next_block = torch.tensor([5, 6, 7, 8]), 0

    monkeypatch.setattr(NoiseSource, "_draw_key", fixed)


@pytest.fixture
def ordinary_algorithms(poisoned_memory: None) -> None:
    """PyTorch's choice, deterministic or not, as outside of tests; the other fixture ends it."""
    torch.use_deterministic_algorithms(False)


def noisy_step(
    model: nn.Module, x: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> Private:
    """A private copy of the model after one backward pass."""
    made = private(model, x, device, 1.0, noise=0.5)
    backward(made, x, dtype)
    return made


def assert_same_bits(runs: list[Released]) -> None:
    first, second = runs
    assert torch.equal(first.norms, second.norms)
    for name, gradient in first.gradients.items():
        assert gradient.isfinite().all()
        assert torch.equal(gradient, second.gradients[name]), name


#: networks, and strategies that some layer of theirs offers
OFFERED = [
    ("rows", "gram"), ("positions", "store"), ("positions", "gram"), ("positions", "recompute"),
    ("images", "store"), ("images", "channel_gram"), ("images", "recompute"), ("text", "store"),
    ("text", "gram"), ("text", "recompute"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("name", "strategy"), OFFERED)
def test_by_strategy(
    name: str,
    strategy: str,
    dtype: torch.dtype | None,
    device: torch.device,
    full_float32: None,
    fixed_key: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With noise; the strategy is taken by every layer that offers it."""
    original = Planner._enter

    def enter(self: Planner, *args: Any) -> Entry:
        entry = original(self, *args)
        entry.work = {name: float(name != strategy) for name in entry.work}
        return entry

    monkeypatch.setattr(Planner, "_enter", enter)
    model, x = network_of(name, 9, device)
    steps = [noisy_step(model, x, device, dtype) for _ in range(2)]
    assert all(strategy in made.strategies() for made in steps)
    assert_same_bits([made.released() for made in steps])


@pytest.mark.parametrize("build", [encoder, lambda: recurrent(nn.LSTM)], ids=["encoder", "lstm"])
def test_layers_in_parts(
    build: Callable[[], nn.Module], device: torch.device, fixed_key: None
) -> None:
    torch.manual_seed(0)
    model = build()
    x = values(5, 7, 20 if isinstance(model, nn.TransformerEncoderLayer) else 9).float().to(device)
    assert_same_bits([noisy_step(model, x, device).released() for _ in range(2)])


@pytest.mark.parametrize("name", ["rows", "positions", "text"])
def test_without_deterministic_algorithms(
    name: str, device: torch.device, fixed_key: None, ordinary_algorithms: None
) -> None:
    model, x = network_of(name, 64, device)
    assert_same_bits([noisy_step(model, x, device).released() for _ in range(2)])


def test_secure_mode(device: torch.device, fixed_key: None) -> None:
    """Noise of integers: the same bits twice, and as large as it shall be."""
    model, x = network_of("rows", 8, device)
    runs = []
    for noise in (0.5, 0.5, 0.0):
        made = private(model, x, device, 2.0, noise=noise, secure_mode=noise > 0)
        backward(made, x)
        runs.append(made.released())
    assert_same_bits(runs[:2])
    noisy, exact = (
        torch.cat([g.double().flatten() for g in run.gradients.values()]) for run in runs[1:]
    )
    assert abs(float((noisy - exact).std()) / (0.5 * 2.0 / 8) - 1) < 6 / math.sqrt(2 * len(noisy))
