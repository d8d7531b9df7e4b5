"""The order of time on packed steps, as in ``torch.nn.utils.rnn.PackedSequence``.

``data`` is [N, F]: step t holds the ``sizes[t]`` samples that are still running, longest first,
N = sum of sizes. A padded batch is the case where all sizes are equal.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch


class Steps(NamedTuple):
    """The order of time: samples per step, and whether the last step comes first."""

    sizes: list[int]
    reverse: bool

    def order(self) -> Iterable[int]:
        """Indices of steps in the order in which the cell takes them."""
        steps = range(len(self.sizes))
        return reversed(steps) if self.reverse else steps

    def firsts(self) -> list[int]:
        """The row with which each step begins."""
        return [0, *itertools.accumulate(self.sizes[:-1])]

    def split(self, data: torch.Tensor) -> Sequence[torch.Tensor]:
        """[N, ...] -> one view per step."""
        return data.split(self.sizes)

    def before(self, first: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """[N, F], the state before each step, of the first one, [B, F], and those after each."""
        batch, rows = self.sizes[0], len(after)
        if self.sizes[-1] == batch:
            pieces = [after[batch:], first] if self.reverse else [first, after[: rows - batch]]
            return torch.cat(pieces)
        each, later = self.split(after), [*self.sizes[1:], 0]
        if not self.reverse:
            return torch.cat([first, *(state[:size] for state, size in zip(each, later))])
        begun = [first[size:until] for size, until in zip(later, self.sizes)]
        return torch.cat([piece for both in zip([*each[1:], first[:0]], begun) for piece in both])


def running(state: torch.Tensor, size: int) -> torch.Tensor:
    """The samples of a state that a step takes."""
    return state if state.size(0) == size else state[:size]


def replaced(state: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The state after a step that took its first samples."""
    size = new.size(0)
    return new if state.size(0) == size else torch.cat([new, state[size:]])
