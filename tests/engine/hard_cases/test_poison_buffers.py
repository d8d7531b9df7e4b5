"""Buffers and parameters in which a forward pass keeps its batch: refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dpkernels.engine.trial.findings import Kind
from tests.engine.hard_cases.refusals import assert_refused, normal, refusal
from tests.engine.support import squared_loss, values
from tests.engine.truth import assert_private


class Memory(nn.Module):
    """A queue of keys in a buffer, written by the forward pass; a running average in a buffer."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.layer, self.read = nn.Linear(5, 3), read
        self.register_buffer("queue", normal(16, 3))
        self.place = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = self.layer(x)
        output = torch.cat([keys, keys @ self.queue.clone().T], 1) if self.read else keys
        places = (torch.arange(len(x)) + self.place) % 16
        self.queue[places] = keys.detach()
        self.place = (self.place + len(x)) % 16
        return output


@pytest.mark.parametrize("read", [False, True])
def test_a_queue_in_a_buffer_is_refused(read: bool) -> None:
    torch.manual_seed(0)
    message = refusal(Memory(read), [(normal(7, 5),)])
    assert_refused(message, "buffer 'queue'", Kind.BUFFER)


class Averaging(nn.Module):
    """A module that keeps a buffer of what passes by in training mode only."""

    def __init__(self, write: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.write = write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = x - self.mean
        if self.training:
            self.write(self.mean, x.detach().mean(0))
        return output


@pytest.mark.parametrize("write", [
    lambda mean, new: mean.mul_(0.9).add_(new), lambda mean, new: mean.copy_(new),
    lambda mean, new: mean.data.mul_(0.9).add_(new), lambda mean, new: mean.lerp_(new, 1e-3),
    lambda mean, new: setattr(mean, "data", new),
])  # fmt: skip
def test_an_average_in_a_buffer_is_refused_and_in_eval_mode_is_private(
    write: Callable[[torch.Tensor, torch.Tensor], Any],
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), Averaging(write), nn.Linear(5, 3)).double()
    message = refusal(model, [(normal(7, 5).double(),)])
    assert_refused(message, "buffer '1.mean'", Kind.BUFFER)
    assert not bool(model[1].mean.any())
    model[1].eval()
    assert_private(model, squared_loss, (values(6, 5),))


class Codebook(nn.Module):
    """A frozen parameter that the forward pass writes: by the batch, or by what is public."""

    def __init__(self, write: Callable[[nn.Module, torch.Tensor], Any], read_from: int = 0) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(5), requires_grad=False)
        self.write, self.read_from, self.steps = write, read_from, 0

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        output = h - self.codes.detach().clone() if self.steps >= self.read_from else h
        self.write(self, h.detach().mean(0))
        self.steps += 1
        return output


def codebook(write: Callable[[nn.Module, torch.Tensor], Any], read_from: int = 0) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 5), Codebook(write, read_from), nn.Linear(5, 3))


@pytest.mark.parametrize("write", [
    lambda m, mean: m.codes.data.lerp_(mean, 0.1), lambda m, mean: m.codes.copy_(mean),
    lambda m, mean: setattr(m, "codes", nn.Parameter(mean, requires_grad=False)),
    lambda m, mean: setattr(m.codes, "data", mean),
])  # fmt: skip
@pytest.mark.parametrize("read_from", [0, 3])
def test_frozen_parameters_that_keep_data_are_refused(
    write: Callable[[nn.Module, torch.Tensor], Any], read_from: int
) -> None:
    torch.manual_seed(0)
    model = codebook(write, read_from)
    message = refusal(model, [(normal(7, 5, seed=seed),) for seed in range(8)])
    assert_refused(message, "parameter '1.codes'", Kind.BUFFER)
    assert bool(model[1].codes.isfinite().all()), "no poison stays"


def test_frozen_parameters_written_by_what_is_public_are_private() -> None:
    torch.manual_seed(0)
    model = codebook(lambda m, mean: m.codes.mul_(0.9).add_(0.1))
    batches = [(normal(7, 5, seed=seed),) for seed in range(4)]
    assert refusal(model, batches, trial="every") is None
