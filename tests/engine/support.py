"""Models, data and private counterparts that several test modules share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    TensorDataset,
)

from dpkernels import PrivacyEngine
from dpkernels.engine.release.optimizer import FusedDPOptimizer


def squared_loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A loss whose gradient depends on the output, mean over rows of axis 0."""
    output = model(batch[0])
    output = output[0] if isinstance(output, tuple) else output
    weight = torch.linspace(
        0.5, 1.5, output[0].numel(), dtype=output.dtype, device=output.device
    ).reshape(output[0].shape)
    return (weight * (output - 0.3).square()).flatten(1).sum(1).mean()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(3))


def values(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x * torch.linspace(0.4, 2.0, shape[0]).double().reshape(-1, *[1] * (len(shape) - 1))


class Call(nn.Module):
    """A module called in a way of its own: ``call(module, x)``."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.module, x)


def made_private(
    model: nn.Module,
    x: torch.Tensor,
    noise: float = 0.0,
    max_grad_norm: object = 1.0,
    **kwargs: object,
) -> tuple[PrivacyEngine, nn.Module, FusedDPOptimizer, DataLoader]:
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x), batch_size=len(x)), noise_multiplier=noise,
        max_grad_norm=max_grad_norm, **kwargs,
    )  # fmt: skip
    return engine, model, optimizer, loader


def step(model: nn.Module, optimizer: FusedDPOptimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    squared_loss(model, (x,)).backward()
    optimizer.step()


def hidden(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The last hidden state, whose sample axis is the second."""
    state = module(x)[1]
    return (state[0] if isinstance(state, tuple) else state).transpose(0, 1)


class Tokens(nn.Module):
    """A vision transformer's root: class token, positions, a scale, a scalar, beside layers."""

    def __init__(self, scale_like_samples: bool = False) -> None:
        super().__init__()
        self.patch = nn.Linear(6, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.scale = nn.Parameter(torch.zeros(8))
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.unused = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 3)
        nn.init.zeros_(self.head.weight[1:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x)], 1) + self.positions
        x = x + self.scale * x.tanh()
        return self.head(x * self.temperature.exp())


class TextClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8, padding_idx=0)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(ids)).mean(1))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


def images(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return TensorDataset(x, (x.mean((1, 2, 3)) > 0).long())


def sentences(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 50, (count, 7), generator=generator)
    return TensorDataset(ids, ids.sum(1) % 3)


def private(
    model: nn.Module,
    dataset: TensorDataset,
    batch_size: int = 8,
    noise: float = 1.0,
    **kwargs: object,
):
    engine = PrivacyEngine()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(dataset, batch_size=batch_size)
    arguments = {"noise_multiplier": noise, "max_grad_norm": 1.0, **kwargs}
    made = engine.make_private(module=model, optimizer=optimizer, data_loader=loader, **arguments)
    return engine, *made
