"""Options that the commands `attack` and `study` of every task share. Light: loads no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from dpkernels.accounting.accountants import guaranteeing

BUDGETS = "1,8,1e3,1e6,1e9,1e12,1e15,inf"
ATTACKS = "imprint,optimal,optimal-run"

Epsilons = Annotated[
    str, typer.Option(help="Budgets, separated by commas; inf trains without privacy.")
]
Accountant = Annotated[
    str,
    typer.Option(
        help="What a budget means: rdp (Opacus' accountant, as most publications), tight (what the "
        f"noise guarantees) or another of {', '.join(guaranteeing())}. The table gives tight, too."
    ),
]
Seeds = Annotated[int, typer.Option(help="Runs for each budget.")]
Attacks = Annotated[
    str,
    typer.Option(
        help="Attacks, separated by commas: imprint, optimal, optimal-run, trap-weights, "
        "gradient-matching."
    ),
]
Attacked = Annotated[int, typer.Option(help="Training patients to attack in each run.")]
StudyOut = Annotated[Path, typer.Option(help="Folder of the study.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show noise and bounds of every budget, and stop.")
]


def names(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated option."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def budgets(text: str) -> tuple[float, ...]:
    """The numbers of --epsilons.

    Raises:
        ValueError: one is none.
    """
    found = []
    for part in names(text):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise ValueError(f"--epsilons must be numbers or inf, got {part!r}")
        found.append(value)
    return tuple(found)
