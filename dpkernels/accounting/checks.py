"""Checks of user input: every refusal names the argument, its value and the allowed range."""

from __future__ import annotations

import math
from numbers import Real


def _range(
    above: float | None, at_least: float | None, below: float | None, at_most: float | None
) -> str:
    parts = [
        f"{sign} {bound:g}"
        for sign, bound in ((">", above), (">=", at_least), ("<", below), ("<=", at_most))
        if bound is not None
    ]
    return " and ".join(parts) or "finite"


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
    expected = f"a finite number {_range(above, at_least, below, at_most)}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}={value!r}: expected {expected}")
    number = float(value)
    if (
        not math.isfinite(number)
        or (above is not None and not number > above)
        or (at_least is not None and not number >= at_least)
        or (below is not None and not number < below)
        or (at_most is not None and not number <= at_most)
    ):
        raise ValueError(f"{name}={value!r}: expected {expected}")
    return number


def check_count(name: str, value: float, *, at_least: int = 1) -> int:
    """Returns `value` as an int if it is an integer in range.

    Raises:
        ValueError: naming the argument, its value and the range.
    """
    expected = f"an integer >= {at_least}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}={value!r}: expected {expected}")
    if not math.isfinite(value) or float(value) != math.floor(value) or value < at_least:
        raise ValueError(f"{name}={value!r}: expected {expected}")
    return int(value)
