"""The words of the risk report: how its numbers read to somebody who is not a statistician."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpkernels.accounting.events import History

SECTIONS = {
    "run": "The run",
    "budget": "Privacy budgets",
    "matching": "Picking the right record among candidates",
    "from scratch": "Reconstruction without prior knowledge",
}

ADVERSARIES = {
    "worst_case": "worst-case attacker (knows the record's gradient)",
    "relaxed": "relaxed attacker (knows its size only)",
}

#: the two correlations that are bounded: values of a coarse picture, and what each is called
COARSE = 256
CORRELATIONS = (
    "correlation with the record (NCC)",
    f"correlation with a coarse picture of it, {COARSE} values (NCC)",
)

_FROM_SCRATCH = (
    "From scratch means without prior knowledge. Who knows what such records look like (that they "
    "are smooth, the anatomy they share, another picture of the same person) is not held to these "
    "correlations; the chance of picking the right candidate is bounded for them too."
)

_READINGS = (
    (0.1, "noise to somebody who knows nothing of such records"),
    (0.3, "mostly noise: at best faint traces"),
    (0.7, "structures of the record may be recognised"),
    (0.95, "the record is recognisable"),
    (math.inf, "a close copy of the record"),
)


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


def number(value: float | None) -> str:
    """Six significant digits, or a dash where nothing is stated."""
    return "-" if value is None else f"{value:.6g}"


def percent(share: float) -> str:
    """A share as a percentage with three significant digits."""
    return f"{100 * share:.3g} %"


def success(gamma: float, kappa: float) -> str:
    """Success with the model beside success without it."""
    return f"at most {percent(gamma)}, against {percent(kappa)} by guessing"


def correlation(value: float) -> str:
    """What a correlation looks like; a reading aid, not a bound."""
    return next(words for limit, words in _READINGS if value <= limit)


def accountants_differ(tight: float, loose: float) -> str:
    """Why the two epsilons differ."""
    ratio = loose / tight if tight > 0 else math.inf
    return (
        f"{ratio:.3g} times the tight value: Renyi accounting converts a few moments of the loss "
        "into epsilon and overstates it; budgets in the literature often mean this number"
    )


def summary(
    history: History, rows: Sequence[Row], kappa: float, delta: float, size: int
) -> tuple[str, ...]:
    """The report in a few sentences: noise first, then both budgets, then the risk."""
    sigma = min(phase.noise_multiplier for phase in history)
    steps = sum(phase.steps for phase in history)
    tight, loose = (row.value for row in rows if row.section == "budget")
    worst = {row.scope: row.value for row in rows if "worst-case" in row.quantity}
    relaxed = {row.scope: row.value for row in rows if "relaxed" in row.quantity}
    budgets = f"epsilon is {number(tight)} under a tight accountant"
    if loose is not None:
        budgets += (
            f" and {number(loose)} under Opacus' RDP accountant: the noise is the same, the "
            "bookkeeping differs, and a budget means nothing without its accountant"
        )
    sentences = [
        f"The run took {steps} steps with noise multiplier {sigma:.6g}.",
        f"Its {budgets}.",
        f"An attacker who has narrowed a record down to {1 / kappa:.4g} candidates and knows each "
        f"one's gradient picks the right one with probability at most "
        f"{percent(worst['whole run'] or 0.0)} from the whole run "
        f"({percent(worst['one update'] or 0.0)} from one update that contains it); one who knows "
        f"only the size of the gradient, at most {percent(relaxed['whole run'] or 0.0)}. Guessing "
        f"succeeds with {percent(kappa)}.",
    ]
    if delta * size >= 1:
        sentences.insert(
            2,
            f"Delta {delta:g} is not below 1 / {size}: a budget with such a delta would allow "
            "publishing a whole record. Choose a delta well below.",
        )
    seen = [row for row in rows if row.quantity in CORRELATIONS and row.value is not None]
    sentences += [
        f"From scratch, {row.scope}: {row.quantity} at most {row.value:.3g} ({row.reading})."
        for row in seen
    ]
    return (*sentences, *[_FROM_SCRATCH] * bool(seen))
