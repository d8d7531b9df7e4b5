"""What several tests of the bench measure."""

from __future__ import annotations

from functools import partial

from bench import cases, models

TINY = cases.Case(
    "tiny",
    "tiny",
    ("quick",),
    partial(models.Recommender, 32, 2, 4, (8,)),
    partial(cases.few_fields, 32, 2, 6),
)
"""A table and two layers, six samples: a step takes a millisecond."""
