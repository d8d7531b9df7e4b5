"""Noise is added once in total, with the right variance, and no process draws another's."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.engine.two_processes.models import (
    WRAPPERS,
    assert_close,
    assert_same_everywhere,
    classifier,
    data,
    gradients,
    loss,
    own_part,
    private,
)

#: coordinates of each draw; the relative standard deviation of a variance is sqrt(2 / COUNT)
COUNT = 20_000


class Wide(nn.Module):
    """A gradient of zero for every coordinate of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(COUNT // 10, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.0 * self.layer(x.expand(-1, COUNT // 10))


def _drawn(wrap: object, skipped: int = 0, passes: int = 1, **kwargs: object) -> torch.Tensor:
    """The noise of one step, [COUNT], on the scale of the sum."""
    batch = (torch.ones(8, 1),)
    _, model, optimizer, _ = private(
        wrap(Wide()), batch, noise_multiplier=2.0, max_grad_norm=1.5, **kwargs
    )
    for index in range(skipped + passes):
        if skipped:
            optimizer.signal_skip_step(index < skipped)
        model(batch[0][:3]).sum().backward()
        if index < skipped:
            optimizer.step()
            optimizer.zero_grad()
    (parameter,) = model.parameters()
    (gradient,) = gradients(model).values()
    scale = 4.0 * passes  # the expected batch size of both processes
    return gradient.reshape(-1).double() * scale


def _assert_std(noise: torch.Tensor, std: float) -> None:
    deviation = float(noise.square().mean()) / std**2 - 1.0
    assert abs(deviation) < 5 * math.sqrt(2 / noise.numel()), deviation
    assert abs(float(noise.mean())) < 5 * std / math.sqrt(noise.numel())


def check_noise_is_added_once() -> None:
    for wrap in WRAPPERS.values():
        for skipped in (0, 2 * dist.get_rank()):
            noise = _drawn(wrap, skipped)
            _assert_std(noise, 3.0)
            assert_same_everywhere([noise])


def check_noise_is_drawn_afresh_by_each_process() -> None:
    """No draw is repeated: not on another shard, not in another step, not after equal seeds."""
    draws = []
    for wrap in (fully_shard, fully_shard, DistributedDataParallel):
        torch.manual_seed(5)
        draws.extend(_drawn(wrap).chunk(2))
    values = torch.cat(draws)
    assert len(values.unique()) > 0.99 * len(values)
    for i, first in enumerate(draws):
        for second in draws[:i]:
            correlation = float((first * second).mean()) / 9.0
            assert abs(correlation) < 5 / math.sqrt(len(first)), correlation


def check_processes_have_keys_of_their_own() -> None:
    _, _, optimizer, _ = private(DistributedDataParallel(classifier()), data(8))
    keys = [torch.empty(4, dtype=torch.int64) for _ in range(2)]
    dist.all_gather(keys, optimizer._noise.take(1)[0])
    assert not torch.equal(*keys)


def check_a_seeded_generator_draws_as_in_one_process() -> None:
    batch = data(6)
    arguments = {"noise_multiplier": 1.0}

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    _, alone, _, _ = private(classifier(), batch, noise_generator=seeded(), **arguments)
    loss(alone, batch).backward()
    _, model, _, _ = private(
        DistributedDataParallel(classifier()), batch, noise_generator=seeded(), **arguments
    )
    loss(model, own_part(batch, (0, 2), (2, 6))).backward()
    assert_close(gradients(model), gradients(alone), 1e-9)


def check_noise_follows_the_largest_bound_of_any_process() -> None:
    """A scheduler that lowers C between physical batches: one process has clipped at the old C."""
    batch = (torch.ones(8, 1),)
    for wrap in (DistributedDataParallel, fully_shard):
        _, model, optimizer, _ = private(
            wrap(Wide()), batch, noise_multiplier=2.0, max_grad_norm=1.5
        )
        if dist.get_rank() == 1:
            optimizer.signal_skip_step(True)
            model(batch[0][:3]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.max_grad_norm = 0.5
        optimizer.signal_skip_step(False)
        model(batch[0][:3]).sum().backward()
        (gradient,) = gradients(model).values()
        _assert_std(gradient.reshape(-1).double() * 4.0, 3.0)


def check_an_empty_step_without_a_forward_pass() -> None:
    batch = (torch.ones(8, 1),)
    _, model, optimizer, _ = private(
        DistributedDataParallel(Wide()), batch, noise_multiplier=2.0, max_grad_norm=1.5
    )
    if dist.get_rank():
        optimizer.make_private_noise_only()
    else:
        model(batch[0]).sum().backward()
    (gradient,) = gradients(model).values()
    _assert_std(gradient.reshape(-1).double() * 4.0, 3.0)
    optimizer.step()
