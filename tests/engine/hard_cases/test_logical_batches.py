"""Logical batches in parts: every sample enters a sum once, or what cannot be right is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine
from dpkernels.engine.release import secure
from dpkernels.engine.release.optimizer import FusedDPOptimizer
from dpkernels.layers.operands import LinearOperand
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


def _half_way(secure_mode: bool) -> tuple[nn.Module, nn.Module, FusedDPOptimizer, torch.Tensor]:
    """A logical batch whose first physical batch is in the sum, and the rows of the second."""
    torch.manual_seed(0)
    x = values(8, 5).float() * 100
    net = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 3, bias=False))
    model, optimizer, _ = PrivacyEngine(secure_mode=secure_mode).make_private(
        module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
        data_loader=DataLoader(TensorDataset(x), batch_size=8), max_grad_norm=1.0,
        noise_multiplier=1e-4 if secure_mode else 0.0, memory_budget=0,
    )  # fmt: skip
    optimizer.signal_skip_step(True)
    squared_loss(model, (x[:4],)).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.signal_skip_step(False)
    return net, model, optimizer, x[4:]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("secure_mode", [False, True])
def test_an_error_while_sums_are_written_breaks_the_logical_batch(
    secure_mode: bool, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some sums hold the physical batch, others do not: to go on would count its samples twice."""
    net, model, optimizer, x = _half_way(secure_mode)
    owner, name = (secure, "rounded_sum") if secure_mode else (LinearOperand, "clipped_grad")
    real, calls = getattr(owner, name), []

    def second_fails(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise error
        return real(*args)

    loss = squared_loss(model, (x,))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, second_fails)
        with pytest.raises(error):
            loss.backward()
    for goes_on in (squared_loss(model, (x,)).backward, optimizer.step):
        with pytest.raises(ValueError, match=r"logical batch is broken.*zero_grad\(\)"):
            goes_on()
    optimizer.zero_grad()
    squared_loss(model, (x,)).backward()
    optimizer.step()
    alone = microbatching(copy.deepcopy(net), squared_loss, (x,), 1.0, expected_batch_size=8)
    for parameter, expected in zip(net.parameters(), alone.gradients.values()):
        assert relative_error(parameter.grad, expected) < (1e-2 if secure_mode else 1e-5)


def test_what_is_refused_before_sums_are_written_breaks_nothing() -> None:
    """A sample that is not finite is found first, so the physical batch can be tried again."""
    net, model, optimizer, x = _half_way(False)
    with pytest.raises(ValueError, match="not finite"):
        squared_loss(model, (x * torch.inf,)).backward()
    squared_loss(model, (x,)).backward()
    whole = values(8, 5).float() * 100
    truth = microbatching(copy.deepcopy(net), squared_loss, (whole,), 1.0, expected_batch_size=8)
    for parameter, expected in zip(net.parameters(), truth.gradients.values()):
        assert relative_error(parameter.grad, expected) < 1e-5


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("secure_mode", [False, True])
def test_a_copy_of_a_logical_batch_under_way_is_broken(
    secure_mode: bool, copied: Callable[[FusedDPOptimizer], FusedDPOptimizer]
) -> None:
    """Sums and noise do not all travel, so a copy cannot go on where this one stands."""
    _, model, optimizer, x = _half_way(secure_mode)
    squared_loss(model, (x,)).backward()
    twin = copied(optimizer)
    with pytest.raises(ValueError, match="broken"):
        twin.step()
    optimizer.step()
    twin.zero_grad()
    twin.make_private_noise_only()
    twin.step()


def test_noise_drawn_for_another_multiplier_is_not_passed_off_as_this_one() -> None:
    """The second of two accumulated passes draws none, so it cannot change how much there is."""
    x = values(4, 5).float()
    _, model, optimizer, _ = made_private(nn.Linear(5, 3), x, 1.0, poisson_sampling=False)
    squared_loss(model, (x,)).backward()
    optimizer.noise_multiplier = 20.0
    with pytest.raises(ValueError, match="drawn in backward.* with 1.0"):
        squared_loss(model, (x,)).backward()
    with pytest.raises(ValueError, match="drawn in backward.* with 1.0"):
        optimizer.step()


def test_a_skip_signal_after_the_noise_is_refused_at_the_next_backward_pass() -> None:
    """The pass would enter a sum that the noise has left, and be lost."""
    x = values(4, 5).float()
    _, model, optimizer, _ = made_private(nn.Linear(5, 3), x, poisson_sampling=False)
    squared_loss(model, (x,)).backward()
    optimizer.signal_skip_step(True)
    with pytest.raises(ValueError, match="had already added the noise"):
        squared_loss(model, (x,)).backward()


def test_a_noised_logical_batch_can_be_dropped_whole() -> None:
    """Also one of several physical batches: nothing of it stays behind."""
    net, model, optimizer, x = _half_way(False)
    squared_loss(model, (x,)).backward()
    optimizer.zero_grad()
    squared_loss(model, (x,)).backward()
    optimizer.step()
    alone = microbatching(copy.deepcopy(net), squared_loss, (x,), 1.0, expected_batch_size=8)
    for parameter, expected in zip(net.parameters(), alone.gradients.values()):
        assert relative_error(parameter.grad, expected) < 1e-5


def test_a_gradient_changed_between_accumulated_passes_is_refused() -> None:
    """The noise is in it: zeros in its place would be released without any."""
    x = values(4, 5).float()
    net = nn.Linear(5, 3)
    _, model, optimizer, _ = made_private(net, x, 1.0, poisson_sampling=False)
    squared_loss(model, (x,)).backward()
    net.zero_grad(set_to_none=False)
    with pytest.raises(ValueError, match="changed or unfrozen while accumulating"):
        squared_loss(model, (x,)).backward()
    optimizer.zero_grad()
    squared_loss(model, (x,)).backward()
    net.weight.grad.mul_(0.5)
    optimizer.step()


def test_a_step_counts_although_every_parameter_was_frozen_after_backward() -> None:
    """Their gradients are there, and the wrapped optimizer uses them."""
    x = values(4, 5).float()
    net = nn.Linear(5, 3)
    engine, model, optimizer, _ = made_private(net, x, 1.0)
    squared_loss(model, (x,)).backward()
    net.requires_grad_(False)
    before = net.weight.clone()
    optimizer.step()
    assert not torch.equal(net.weight, before)
    assert engine.accountant.history == [(1.0, 1.0, 1)]


def test_a_first_physical_batch_cleared_before_its_step_is_dropped() -> None:
    """No step was skipped yet, so no sum waits: run again, its samples count once."""
    torch.manual_seed(0)
    x = values(4, 5).float() * 100
    net = nn.Linear(5, 3)
    _, model, optimizer, _ = made_private(net, x, poisson_sampling=False)
    optimizer.signal_skip_step(True)
    squared_loss(model, (x,)).backward()
    optimizer.zero_grad()
    squared_loss(model, (x[:1],)).backward()
    assert float(torch.sqrt(sum(p.summed_grad.square().sum() for p in net.parameters()))) <= 1.0


def test_a_bound_that_was_refused_leaves_no_trace() -> None:
    """``secure_mode=True`` fits its grid to the first bound; set back, training goes on."""
    _, model, optimizer, x = _half_way(True)
    optimizer.max_grad_norm = 2.0
    with pytest.raises(ValueError, match="logical batch began with"):
        squared_loss(model, (x,)).backward()
    optimizer.max_grad_norm = 1.0
    squared_loss(model, (x,)).backward()
    optimizer.step()
