"""What several tests of the bench measure."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

from bench import cases, models, results, table

TINY = cases.Case(
    "tiny",
    "tiny",
    "quick",
    partial(models.Recommender, 32, 2, 4, (8,)),
    partial(cases.few_fields, 32, 2, 6),
)
"""A table and two layers, six samples: a step takes a millisecond."""


def write(path: Path, rows: list[results.Row]) -> None:
    """Write rows of steps in the place of those with the same keys, as the part does."""
    table.replace(path, [asdict(row) for row in rows], results.KEY)
