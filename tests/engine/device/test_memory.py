"""What a private step allocates on a GPU above an ordinary one, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dpkernels.engine.plan.planner import Entry, Planner
from tests.engine.device.support import backward, private
from tests.engine.support import squared_loss

pytestmark = pytest.mark.gpu

SAMPLES, POSITIONS, WIDTH, LAYERS = 32, 8, 512, 3
#: bytes: the gradients of all weights, and those of every sample
SUMS = LAYERS * 4 * WIDTH**2
STORED = SAMPLES * SUMS
#: bytes of activations, norms and factors, and what the allocator rounds up
SLACK = 8 << 20


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers)


def allocated(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes above what was allocated before: at most, and left at the end."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(SAMPLES, POSITIONS, WIDTH, device="cuda")


@pytest.fixture
def ordinary(x: torch.Tensor) -> int:
    """Bytes that a forward and a backward pass of the plain model take at most."""
    model = network().cuda()
    squared_loss(model, (x,)).backward()
    model.zero_grad()
    return allocated(lambda: squared_loss(model, (x,)).backward())[0]


def private_step(x: torch.Tensor, budget: int) -> tuple[set[str], int, int]:
    """Strategies of a settled plan, bytes at most and bytes left, gradients among them."""
    made = private(network(), x, x.device, 1.0, memory_budget=budget)
    backward(made, x)
    made.optimizer.zero_grad(set_to_none=True)
    highest, left = allocated(lambda: backward(made, x))
    weights = {r["strategy"] for r in made.engine.explain().rows if "weight" in r["parameter"]}
    return weights, highest, left


def test_norms_of_factors_store_nothing(x: torch.Tensor, ordinary: int) -> None:
    strategies, highest, left = private_step(x, 0)
    assert strategies == {"gram"}
    assert left <= SUMS + SLACK
    assert highest <= ordinary + SUMS + SLACK
    assert ordinary + SUMS + SLACK < STORED, "storing would pass"


def test_stored_gradients_are_freed(
    x: torch.Tensor, ordinary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are held once, until the sums are formed, and not beyond the backward pass."""
    original = Planner._enter

    def enter(self: Planner, *args: Any) -> Entry:
        entry = original(self, *args)
        entry.work = {name: float(name != "store") for name in entry.work}
        return entry

    monkeypatch.setattr(Planner, "_enter", enter)
    strategies, highest, left = private_step(x, 2 * STORED)
    assert strategies == {"store"}
    assert STORED <= highest <= ordinary + STORED + SUMS + SLACK
    assert left <= SUMS + SLACK
