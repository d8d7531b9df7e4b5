"""The base table of the discrete Gaussian sampler (docs/math.md section 3, "Integer noise").

Everything here is exact to 60 decimal digits and computed once, without floating point.
"""

from __future__ import annotations

import functools
from decimal import Decimal, localcontext

import numpy as np

#: standard deviation of one level
LEVEL_STD = 128
#: what a level counts in units of the one below
RADIX = 64
#: levels of a value: a level takes 128 bits, so a value takes one ChaCha20 block
LEVELS = 4
#: variance of a value
VARIANCE = LEVEL_STD**2 * sum(RADIX ** (2 * level) for level in range(LEVELS))
#: the widest value of one level; less than 2^-123 is cut off beyond each end
LIMIT = 1640
#: total variation between one value and the exact discrete Gaussian, at most
STATISTICAL_DISTANCE = 1e-33
#: steps of the search: it always takes as many
SEARCH_STEPS = (2 * LIMIT).bit_length()


@functools.cache
def level_probabilities() -> tuple[Decimal, ...]:
    """P[X = j] for j from -LIMIT to LIMIT, X discrete Gaussian with standard deviation LEVEL_STD.

    The mass beyond, below 2^-122 of it, is left out of the sum.
    """
    with localcontext() as context:
        context.prec = 60
        base = [(Decimal(-j * j) / (2 * LEVEL_STD**2)).exp() for j in range(LIMIT + 1)]
        total = base[0] + 2 * sum(base[1:])
        return tuple(base[abs(j)] / total for j in range(-LIMIT, LIMIT + 1))


@functools.cache
def thresholds() -> np.ndarray:
    """[2^SEARCH_STEPS - 1, 2] uint64, (high, low): 2^128 P[X <= -LIMIT + j], rounded.

    A level's value is -LIMIT + how many of the first 2 LIMIT thresholds are at most its 128 uniform
    bits. The others are the largest number, so that a search finds its way in whole steps.
    """
    with localcontext() as context:
        context.prec = 60
        cumulative, rows = Decimal(0), []
        for probability in level_probabilities()[:-1]:
            cumulative += probability
            number = int((cumulative * 2**128).to_integral_value())
            rows.append(divmod(number, 2**64))
    rows += [(2**64 - 1, 2**64 - 1)] * (2**SEARCH_STEPS - 1 - len(rows))
    return np.array(rows, dtype=np.uint64)
