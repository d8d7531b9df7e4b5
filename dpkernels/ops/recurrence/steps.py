"""The order of time on packed steps, as in ``torch.nn.utils.rnn.PackedSequence``.

``data`` is [N, F]: step t holds the ``sizes[t]`` samples that are still running, longest first,
N = sum of sizes. A padded batch is the case where all sizes are equal.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Steps:
    """The order of time: samples per step, and whether the last step comes first."""

    sizes: list[int]
    reverse: bool

    def order(self) -> Iterable[int]:
        """Indices of steps in the order in which the cell takes them."""
        steps = range(len(self.sizes))
        return reversed(steps) if self.reverse else steps

    @functools.cached_property
    def firsts(self) -> list[int]:
        """The row with which each step begins."""
        return [0, *itertools.accumulate(self.sizes[:-1])]

    def split(self, data: torch.Tensor) -> Sequence[torch.Tensor]:
        """[N, ...] -> one view per step."""
        return data.split(self.sizes)


def running(state: torch.Tensor, size: int) -> torch.Tensor:
    """The samples of a state that a step takes."""
    return state if state.size(0) == size else state[:size]


def replaced(state: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The state after a step that took its first samples."""
    size = new.size(0)
    return new if state.size(0) == size else torch.cat([new, state[size:]])
