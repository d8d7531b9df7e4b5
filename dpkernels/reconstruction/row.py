"""One line of the risk report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        section: "run", "budget", "matching" or "from scratch".
        scope: "run", "one update" or "whole run".
        quantity: what is stated.
        value: the number; None where nothing can be proven, and `reading` says why.
        kind: "given", "upper bound" or "lower bound" (of what the value stands for).
        reading: the same in plain words.
    """

    section: str
    scope: str
    quantity: str
    value: float | None
    kind: str
    reading: str
