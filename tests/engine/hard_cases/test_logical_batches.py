"""Logical batches in parts: every sample enters a sum once, or what cannot be right is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import TensorDataset

from dpkernels.engine.release.optimizer import FusedDPOptimizer
from tests.engine.support import made_private, private, squared_loss, values
from tests.engine.truth import microbatching, relative_error


def _norm_of_sum(optimizer: FusedDPOptimizer) -> float:
    total = torch.cat([p.grad.flatten() for p in optimizer.params if p.grad is not None])
    return float(total.norm()) * optimizer.expected_batch_size


@pytest.mark.parametrize("poisson_sampling", [True, False])
@pytest.mark.parametrize("skipped", [True, False])
def test_one_forward_pass_has_one_backward_pass(skipped: bool, poisson_sampling: bool) -> None:
    x = values(4, 5).float()
    _, model, optimizer, _ = made_private(nn.Linear(5, 3), x, poisson_sampling=poisson_sampling)
    optimizer.signal_skip_step(skipped)
    loss = squared_loss(model, (x,))
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match="second backward pass through the same forward pass"):
        loss.backward()


@pytest.mark.parametrize("cleared", [True, False])
def test_one_physical_batch_has_one_backward_pass(cleared: bool) -> None:
    """Also where it is not the last, whose sums ``zero_grad()`` leaves."""
    x = values(4, 5).float()
    _, model, optimizer, _ = made_private(nn.Linear(5, 3), x)
    for skipped in (True, True, False):
        optimizer.signal_skip_step(skipped)
    squared_loss(model, (x,)).backward()
    optimizer.step()
    optimizer.zero_grad()
    squared_loss(model, (x,)).backward()
    if cleared:
        optimizer.zero_grad()
    with pytest.raises(ValueError, match="not compatible with grad accumulation"):
        squared_loss(model, (x,)).backward()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_logical_batch_left_half_way_is_dropped(workers: int) -> None:
    """A loop over ``BatchMemoryManager`` that breaks off and starts again."""
    torch.manual_seed(1)
    model = nn.Linear(5, 3)
    data = TensorDataset(values(40, 5).float() * 100)
    _, wrapped, optimizer, loader = private(model, data, 20, noise=0.0)
    if workers:
        loader.num_workers, loader.prefetch_factor = workers, 2
    twin = copy.deepcopy(model)
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=4, optimizer=optimizer
    ) as physical:
        for stop in (2, None):
            seen = []
            for (batch,) in physical:
                seen.append(batch)
                optimizer.zero_grad()
                squared_loss(wrapped, (batch,)).backward()
                optimizer.step()
                if model.weight.grad is not None or len(seen) == stop:
                    break
    expected = microbatching(
        twin, squared_loss, (torch.cat(seen),), 1.0, expected_batch_size=20
    ).gradients
    assert relative_error(model.weight.grad, expected["weight"]) < 1e-5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_physical_batch_without_a_step_is_refused(workers: int) -> None:
    """``if not len(batch): continue`` would shift where logical batches end, for good."""
    torch.manual_seed(1)
    _, model, optimizer, loader = private(nn.Linear(5, 3), TensorDataset(values(40, 5).float()), 20)
    if workers:
        loader.num_workers, loader.prefetch_factor = workers, 2

    def loop(passed_over: int | None) -> None:
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=4, optimizer=optimizer
        ) as physical:
            for count, (batch,) in enumerate(physical):
                if count == passed_over:
                    continue
                optimizer.zero_grad()
                squared_loss(model, (batch,)).backward()
                optimizer.step()

    loop(None)
    with pytest.raises(ValueError, match="passed over without"):
        loop(2)
    loop(None)


def test_a_sum_of_a_parameter_frozen_meanwhile_is_dropped() -> None:
    """What it had from the first physical batch belongs to no later logical batch."""
    torch.manual_seed(0)
    x = values(4, 5).float() * 100
    net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))
    _, model, optimizer, _ = made_private(net, x, noise=1e-9)
    optimizer.signal_skip_step(True)
    optimizer.signal_skip_step(False)
    for frozen in (False, True):
        net[0].requires_grad_(not frozen)
        squared_loss(model, (x,)).backward()
        optimizer.step()
        optimizer.zero_grad()
    net[0].requires_grad_(True)
    squared_loss(model, (x[:1],)).backward()
    assert _norm_of_sum(optimizer) <= 1.0 + 1e-6
