"""Whole training steps, case by case: ours, the ordinary step and every rival."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from rich.table import Table

from bench import cases, harness, report, results, rivals, timing, work
from bench.harness import Plan

PATH = results.RESULTS / "steps.csv"
PLANS = {
    "cpu": Plan(seconds=5.0),
    "quick": Plan(seconds=3.0, least=3, most=20),
    "gpu": Plan(seconds=3.0, case_seconds=45.0, least=5, most=40),
}
#: the rivals of the first pass over all cases; the second has the others
FIRST = ("ours", "loop")
PASSES = ("first", "second")


def of_pass(which: str) -> list[rivals.Rival]:
    """The rivals of the first or of the second pass, the ordinary step in both.

    Raises:
        ValueError: another name.
    """
    if which not in PASSES:
        raise ValueError(f"pass {which!r}: expected one of {', '.join(PASSES)}")
    others = [r.name for r in rivals.RIVALS if r.private and r.name not in FIRST]
    return rivals.find(list(FIRST) if which == "first" else others)


def run(
    wanted: Sequence[cases.Case],
    chosen: Sequence[rivals.Rival],
    device: torch.device,
    plan: Plan,
    path: Path,
    *,
    fresh: bool = False,
    budget: float | None = None,
    piece_seconds: float | None = None,
) -> work.Outcome:
    """Measure cases and print them; the rows are written case by case, so that a run can go on.

    A run without ours, as the second pass is, leaves an ordinary step's row of the same commit in
    its place, since the ratios of ours were taken to that one.
    On a GPU, ours and the ordinary step are profiled for the column `busy` when all is timed: the
    profiler may leave launches slower than it found them.
    """
    timing.allow_tf32(False)
    warnings.simplefilter("ignore")
    before = {row.key: row for row in results.read(path)}
    names = [rival.name for rival in chosen]
    end = None if budget is None else time.monotonic() + budget

    def measure(case: cases.Case, report: work.Report) -> None:
        rows = harness.measure(case, list(chosen), device, _until(plan, end), report)
        if "ours" not in names:
            own = next(row for row in rows if row.rival == "ordinary")
            there = next((row for row in results.read(path) if row.key == own.key), None)
            if there and there.status == "ok" and there.commit == own.commit:
                rows.remove(own)
        results.replace(path, rows)

    def profile(case: cases.Case, report: work.Report) -> None:
        rows = [r for r in results.read(path) if r.case == case.name and r.measured_on(here)]
        if rows:
            results.replace(path, harness.profiled(rows, case, device, report))

    settings = {
        "cases": [case.name for case in wanted],
        "rivals": names,
        "plan": asdict(plan),
        "output": str(path),
    }
    here = results.Environment.here(device, plan.allocator)
    part = "-".join(["steps", device.type, str(here.threads), plan.allocator, *names[1:]])
    todo = {case.name: partial(measure, case) for case in wanted}
    if device.type == "cuda" and "ours" in names:
        todo |= {f"{case.name}, profile": partial(profile, case) for case in wanted}

    def lost(item: str, status: str) -> None:
        """Rows of a case that ended the process before its first rival was begun."""
        case = next((case for case in wanted if case.name == item), None)
        if case is not None:
            results.replace(path, harness.unmeasured(case, list(chosen), here, status))

    outcome = work.off(
        todo,
        part,
        settings,
        fresh=fresh,
        budget=budget,
        piece_seconds=piece_seconds,
        lost=lost,
    )
    listed = {case.name for case in wanted}
    show([r for r in results.read(path) if r.case in listed and r.measured_on(here)], before)
    return outcome


def _until(plan: Plan, end: float | None) -> Plan:
    """The plan of a case that begins now, when the run is to end at `end` (monotonic seconds).

    Only a plan that bounds the seconds of a case has a case cut short by the end of the run; in
    the others a case that has begun is measured to its end, and the next run begins with another.
    """
    if end is None or plan.case_seconds is None:
        return plan
    return replace(plan, case_seconds=min(max(end - time.monotonic(), 0.0), plan.case_seconds))


def show(rows: list[results.Row], before: dict[tuple[str, ...], results.Row]) -> None:
    """Print rows as a table, what could not run, and how ours moved."""
    table = Table(*report.heads(), title="time / memory over the ordinary step")
    for line in report.lines(rows):
        table.add_row(*line)
    work.console.print(table)
    for row in rows:
        if row.busy is not None:
            text = f"{row.case}, {row.rival}: {row.ms:.2f} ms, GPU busy {row.busy:.0%} of it, "
            work.console.print(f"{text}Python returns after {row.host_ms:.2f} ms", highlight=False)
        if row.status != "ok":
            text = f"{row.case}, {row.rival}: {row.status}"
            work.console.print(text, highlight=False, markup=False)
        earlier = before.get(row.key)
        if row.rival == "ours" and earlier and earlier.best_ratio and row.best_ratio:
            text = f"{row.case}: {row.best_ratio:.2f}, was {earlier.best_ratio:.2f} at "
            work.console.print(text + earlier.commit, highlight=False)
