"""A short training with trials and without: what it trains on, and what there is afterwards."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.engine.support import made_private

Forward = Callable[..., Any]


class Net(nn.Module):
    """Two layers, a forward pass of one's own, and what it keeps."""

    def __init__(self, forward: Forward, keep: Callable[[nn.Module], None] | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)
        self.table = nn.Embedding(20, 5)
        self.teacher = copy.deepcopy(self.a).requires_grad_(False)
        self.run = forward
        if keep is not None:
            keep(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def plain(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.b(net.a(x).tanh())


@dataclass
class Trained:
    """A short training, noise off, and what there is afterwards."""

    gradients: list[torch.Tensor] = field(default_factory=list)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    numbers: tuple[float, ...] = ()
    batches: list[Any] = field(default_factory=list)
    warnings: set[str] = field(default_factory=set)
    net: Any = None


def squares(output: Any) -> torch.Tensor:
    return (output.float() - 0.1).flatten(1).square().sum(1).mean()


def train(
    forward: Forward,
    batches: list[Any],
    trial: str,
    keep: Callable[[nn.Module], None] | None = None,
    loss: Callable[[nn.Module, Any], torch.Tensor] = lambda model, batch: squares(model(*batch)),
    **arguments: Any,
) -> Trained:
    """Train on the batches, which are copied first."""
    torch.manual_seed(0)
    net, trained = Net(forward, keep), Trained()
    model, optimizer = made_private(net, batches[0][0], trial=trial, **arguments)[1:3]
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - models use it
    trained.net, trained.batches = net, copy.deepcopy(batches)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for batch in trained.batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            trained.gradients += [p.grad.clone() for p in net.parameters() if p.grad is not None]
            optimizer.step()
    trained.warnings = {str(warning.message) for warning in said}
    trained.state = {name: value.clone() for name, value in net.state_dict().items()}
    trained.numbers = (float(torch.rand(())), random.random(), np.random.rand())  # noqa: NPY002
    return trained


def assert_no_alarm(forward: Forward, batches: list[Any], **arguments: Any) -> Trained:
    """Training is the same whether every batch is tried or none is."""
    expected = train(forward, batches, "off", **arguments)
    actual = train(forward, batches, "every", **arguments)
    torch.testing.assert_close(actual.gradients, expected.gradients)
    torch.testing.assert_close(actual.state, expected.state)
    torch.testing.assert_close(actual.batches, expected.batches, equal_nan=True)
    assert actual.numbers == expected.numbers, "generators stand where they stood"
    assert actual.warnings <= expected.warnings
    return actual


def floats(*rows: int, shape: tuple[int, ...] = (5,)) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(count, *shape, generator=generator),) for count in rows]


def texts(*rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Indices padded by 0, and masks of those that count; the longest has one pad."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for count in rows:
        lengths = torch.randint(2, 6, (count, 1), generator=generator)
        lengths[-1] = 6
        mask = torch.arange(7) < lengths
        made.append((torch.randint(1, 20, (count, 7), generator=generator) * mask, mask))
    return made
