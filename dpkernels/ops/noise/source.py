"""Where keys and block counters come from: one source, no block twice."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Sequence

import torch

VALUES_PER_BLOCK = 8

_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


def blocks_needed(numel: int) -> int:
    """How many ChaCha20 blocks a call over `numel` elements uses."""
    return -(-numel // VALUES_PER_BLOCK)


class NoiseSource:
    """A 256-bit key from the operating system and a block counter that only moves forward.

    Guarantees:
        No (key, block) is handed out twice: the counter never goes back, and a copy, an unpickled
        twin or a forked child draws a key of its own. The key is never pickled or printed.
    """

    def __init__(self) -> None:
        self._renew()

    def take(self, numel: int) -> tuple[torch.Tensor, int]:
        """Reserve the blocks for `numel` values.

        Args:
            numel: number of values that the caller is going to draw, >= 0.

        Returns:
            The key, [4] int64 on the CPU, and the first block counter of the reservation.
        """
        if numel < 0:
            raise ValueError(f"numel={numel}: expected a number of values >= 0")
        return self.take_blocks(blocks_needed(numel))

    def take_blocks(self, count: int) -> tuple[torch.Tensor, int]:
        """Reserve `count` whole blocks: integer noise takes one for each value."""
        if self._drawn_after_forks != _forks:
            self._renew()
        with self._lock:
            if self._next_block + count >= 2**63:
                self._draw_key()
            block = self._next_block
            self._next_block += count
            return self._key, block

    def take_each(self, numels: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """Reserve the blocks for several tensors at once.

        Args:
            numels: number of values of each tensor, >= 0.

        Returns:
            The key, [4] int64 on the CPU, and the first block counter of each tensor.
        """
        ends = list(itertools.accumulate(map(blocks_needed, numels), initial=0))
        key, first = self.take(VALUES_PER_BLOCK * ends[-1])
        return key, [first + end for end in ends[:-1]]

    def _renew(self) -> None:
        self._drawn_after_forks = _forks
        self._lock = threading.Lock()
        self._draw_key()

    def _draw_key(self) -> None:
        self._key = torch.frombuffer(bytearray(os.urandom(32)), dtype=torch.int64)
        self._next_block = 0

    def __reduce__(self) -> tuple[type[NoiseSource], tuple[()]]:
        return (NoiseSource, ())
