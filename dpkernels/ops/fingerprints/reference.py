"""Plain and slow: rows are read in pieces, so that memory does not grow with them."""

from __future__ import annotations

import torch

from dpkernels.ops.fingerprints.multipliers import BLOCK, IN_BLOCK, OF_BLOCK, multiplier, signs
from dpkernels.ops.fingerprints.runs import runs_of

#: values of all samples that are read at a time, at least a block of each
_PIECE = 2**16
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See the contract."""
    read = runs_of(rows)
    values = read.view()
    size, device = read.runs * read.length, rows.device
    step = max(1, _PIECE // (max(1, read.samples) * BLOCK)) * BLOCK
    bits = torch.zeros(read.samples, 2, dtype=torch.int64, device=device)
    moments = torch.zeros(read.samples, 3, dtype=torch.float64, device=device)
    for begin in range(0, size, step):
        place = torch.arange(begin, min(size, begin + step), device=device)
        piece = values[:, place // read.length, place % read.length]
        block, at = place // BLOCK, place % BLOCK
        outer = [multiplier(block, seed) for seed in OF_BLOCK]
        for word, shift in _words(piece):
            inner = [multiplier(at + shift, seed) for seed in IN_BLOCK]
            for i in range(2):
                bits[:, i] += (word * (inner[i] * outer[i])).sum(1)
        wide = piece.double()
        terms = wide, wide.square(), wide * signs(at, outer[0])
        moments += torch.stack([each.sum(1) for each in terms], 1)
    return bits, moments


def _words(piece: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """The 32-bit words of values as int64, and what is added to a word's place in its block."""
    width = piece.element_size()
    word = piece.view(_WORDS[width]).long()
    if width < 4:
        word = word & (2 ** (8 * width) - 1)
    low = word & 0xFFFFFFFF
    return [(low, 0), ((word >> 32) & 0xFFFFFFFF, BLOCK)] if width == 8 else [(low, 0)]
