"""What a step is meant to cost, and the cases that cost more, with the reason on file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench import rivals, table
from bench.results import Row
from bench.table import number

PATH = Path(__file__).resolve().parent / "targets.csv"
REASONS = PATH.with_name("reasons.csv")
NO_REASON = "no reason stated"
#: a difference between the best rival and ours that the machine alone makes
NOISE = 0.03


@dataclass(frozen=True)
class Target:
    """A line of targets.csv; ratios to the ordinary step.

    Attributes:
        predicted: time / memory, written down before the measurement.
        reasons: why the case is above, for as long as it is: names of lines in reasons.csv, or
            text, separated by semicolons.
    """

    time: float | None
    memory: float | None
    predicted: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Miss:
    """What of ours is above its target or slower than a rival, and why."""

    found: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.found}: {'; '.join(self.reasons) or NO_REASON}"


def read() -> dict[str, Target]:
    """By case."""
    return {
        row["case"]: Target(
            number(row["time"]),
            number(row["memory"]),
            row["predicted"],
            tuple(part for text in row["reason"].split(";") if (part := text.strip())),
        )
        for row in table.read(PATH)
    }


def reasons() -> dict[str, str]:
    """What a reason that several cases share says, by its name."""
    return {row["name"]: row["text"] for row in table.read(REASONS)}


def missed(rows: list[Row], targets: dict[str, Target]) -> dict[str, Miss]:
    """By case: what of ours is above its target, or slower than a rival; one group of rows."""
    found = {}
    for row in rows:
        if row.rival != "ours" or row.status != "ok" or row.best_ratio is None:
            continue
        target = targets.get(row.case)
        parts = []
        if target and target.time and row.best_ratio > target.time:
            parts.append(f"time {row.best_ratio:.3f}, target {target.time:.2f}")
        if target and target.memory and row.memory_ratio and row.memory_ratio > target.memory:
            parts.append(f"memory {row.memory_ratio:.3f}, target {target.memory:.2f}")
        rival = fastest_rival(row.case, rows)
        if rival and rival.best_ratio and rival.best_ratio < row.best_ratio * (1.0 - NOISE):
            parts.append(f"{rivals.TITLES[rival.rival]} is faster, {rival.best_ratio:.2f}")
        if parts:
            found[row.case] = Miss("; ".join(parts), target.reasons if target else ())
    return found


def fastest_rival(case: str, rows: list[Row]) -> Row | None:
    """Of the private ones but ours."""
    others = [
        row
        for row in rows
        if row.case == case
        and row.rival not in ("ours", "ordinary")
        and row.status == "ok"
        and row.best_ratio is not None
    ]
    return min(others, key=lambda row: row.best_ratio or 0.0, default=None)
