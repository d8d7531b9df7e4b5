"""The pseudo-random numbers of places; csrc/cpu/fingerprint.cpp has the same.

A place is a block of 1024 values and a place in the block. The number of each sum for a word is the
product of two numbers, one of the block and one of the word in the block: the word of value i is i;
the high word of a value of 64 bits is 1024 + i. Both are MurmurHash3's finalizer, odd. The sign
of value i is the highest bit of the first sum's number i + 8 s in the block, where s is the highest
seven bits of the first sum's number of the block.
"""

from __future__ import annotations

import torch

BLOCK = 1024
#: what numbers are drawn with, for each sum
IN_BLOCK = (0x9E3779B9, 0xC2B2AE35)
OF_BLOCK = (0x27D4EB2F, 0x165667B1)

_LOW = 0xFFFFFFFF


def multiplier(place: torch.Tensor, seed: int) -> torch.Tensor:
    """The odd 32-bit number of each place, a number below 2^32: int64, as is the result."""
    x = (place & _LOW) ^ seed
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW
    return (x ^ (x >> 16)) | 1


def signs(at: torch.Tensor, of_block: torch.Tensor) -> torch.Tensor:
    """+1 or -1 for each place `at` in a block; float64.

    Args:
        at: places in blocks, int64.
        of_block: the numbers of the blocks in the first sum.
    """
    number = multiplier(at + 8 * (of_block >> 25), IN_BLOCK[0])
    return 1.0 - 2.0 * (number >> 31).double()
