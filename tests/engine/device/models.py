"""Small networks of several layers, and batches that are drawn on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Text(nn.Module):
    """Tokens, a normalisation, a layer over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 20, padding_idx=0)
        self.norm = nn.LayerNorm(20)
        self.layer = nn.Linear(20, 40)
        self.head = nn.Linear(40, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.norm(self.embedding(ids))).tanh().mean(1))


def rows() -> nn.Module:
    """One position for each sample: the norm is a product of two norms."""
    return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 4))


def positions() -> nn.Module:
    """Few positions and wide layers: norms by Gram products."""
    return nn.Sequential(nn.Linear(40, 96), nn.ReLU(), nn.Linear(96, 36), nn.Flatten(1))


def images() -> nn.Module:
    """Small maps of many channels at the end: norms by Gram products over channels."""
    return nn.Sequential(
        nn.Conv2d(3, 18, 3, 2, 1), nn.GroupNorm(3, 18), nn.ReLU(), nn.Conv2d(18, 36, 3),
        nn.Flatten(), nn.Linear(144, 5),
    )  # fmt: skip


def _spread(count: int, *shape: int, draw: torch.Generator) -> torch.Tensor:
    """Normal values whose size differs from sample to sample by up to 100."""
    x = torch.randn(count, *shape, generator=draw, device=draw.device)
    size = 10.0 ** (2 * torch.rand(count, generator=draw, device=draw.device) - 1)
    return x * size.reshape(-1, *[1] * len(shape))


Draw = Callable[[int, torch.Generator], torch.Tensor]

#: by name: how the network is built, and its batch of a given size by a generator of the device
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Draw]] = {
    "rows": (rows, lambda count, draw: _spread(count, 40, draw=draw)),
    "positions": (positions, lambda count, draw: _spread(count, 5, 40, draw=draw)),
    "images": (images, lambda count, draw: _spread(count, 3, 8, 8, draw=draw)),
    "text": (
        Text,
        lambda count, draw: torch.randint(50, (count, 9), generator=draw, device=draw.device),
    ),
}


def network_of(
    name: str, count: int, device: torch.device, seed: int = 1
) -> tuple[nn.Module, torch.Tensor]:
    """The network in float32 on the CPU and a batch on `device`, the same in every call."""
    torch.manual_seed(seed)
    build, batch = NETWORKS[name]
    return build(), batch(count, torch.Generator(device).manual_seed(seed))
