"""An exponential moving average of the weights: post-processing, so it costs no privacy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class WeightAverage:
    """Averages parameters after every step.

    The decay warms up as (1 + t) / (10 + t), so that the start is soon forgotten.

    Args:
        network: whose parameters are averaged.
        decay: of the average, in [0, 1); 0 switches it off.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._decay = decay
        self._updates = 0
        self._average = (
            {name: value.detach().clone() for name, value in network.named_parameters()}
            if decay
            else {}
        )

    @property
    def enabled(self) -> bool:
        """Whether anything is averaged."""
        return bool(self._decay)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the current weights."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        parameters = dict(network.named_parameters())
        for name, average in self._average.items():
            average.lerp_(parameters[name].detach(), 1 - decay)

    def weights(self, network: nn.Module) -> dict[str, torch.Tensor]:
        """The network's state with the averaged parameters in it."""
        return {**network.state_dict(), **self._average}

    @contextlib.contextmanager
    def applied_to(self, network: nn.Module) -> Iterator[None]:
        """The averaged weights inside the block, the trained ones after it."""
        trained = {name: value.clone() for name, value in network.state_dict().items()}
        network.load_state_dict(self.weights(network))
        try:
            yield
        finally:
            network.load_state_dict(trained)

    def state_dict(self) -> dict:
        """Averaged parameters and the number of updates."""
        return {"updates": self._updates, "average": self._average}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self._updates = state["updates"]
        for name, value in state["average"].items():
            self._average[name].copy_(value)
