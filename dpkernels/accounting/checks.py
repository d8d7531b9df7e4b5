"""Checks of user input: every refusal names the argument, its value and the allowed range."""

from __future__ import annotations

import math
import operator
from numbers import Real


def check_number(
    name: str,
    value: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> float:
    """Returns `value` as a float if it is finite and in range.

    Raises:
        ValueError: naming the argument, its value and the range.
    """
    bounds = (
        (">", above, operator.gt),
        (">=", at_least, operator.ge),
        ("<", below, operator.lt),
        ("<=", at_most, operator.le),
    )
    limits = [(sign, bound, holds) for sign, bound, holds in bounds if bound is not None]
    if not _is_finite(value) or not all(holds(float(value), bound) for _, bound, holds in limits):
        stated = " and ".join(f"{sign} {bound:g}" for sign, bound, _ in limits)
        raise ValueError(f"{name}={value!r}: expected a finite number {stated}".rstrip())
    return float(value)


def check_count(name: str, value: float, *, at_least: int = 1) -> int:
    """Returns `value` as an int if it is an integer in range.

    Raises:
        ValueError: naming the argument, its value and the range.
    """
    if not _is_finite(value) or float(value) != math.floor(value) or value < at_least:
        raise ValueError(f"{name}={value!r}: expected an integer >= {at_least}")
    return int(value)


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
