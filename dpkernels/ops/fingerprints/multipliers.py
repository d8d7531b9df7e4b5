"""The pseudo-random numbers of places; csrc/cpu/fingerprint.cpp has the same.

A place is a block of 1024 values and a place in the block. The number of each sum for a word is the
product of two numbers, one of the block and one of the word in the block: the word of value i is i,
the high word of a value of 64 bits is 1024 + i. Both numbers are the finalizer of MurmurHash3, made
odd. The sign of a value is the product of the signs of the first sum's two numbers, read as int32.
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


def sign(number: torch.Tensor) -> torch.Tensor:
    """-1 where the highest of 32 bits is set, else +1; float64."""
    return 1.0 - 2.0 * (number >> 31).double()
