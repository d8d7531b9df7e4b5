"""Whole training steps, case by case: ours, the ordinary step and every rival."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.table import Table

from bench import cases, harness, report, results, rivals, work
from bench.harness import Plan

PATH = results.RESULTS / "steps.csv"
PLANS = {
    "cpu": Plan(seconds=5.0),
    "quick": Plan(seconds=3.0, least=3, most=20),
    "gpu": Plan(seconds=5.0, least=5, most=40),
}


def run(
    wanted: Sequence[cases.Case],
    chosen: Sequence[rivals.Rival],
    device: torch.device,
    plan: Plan,
    path: Path,
    *,
    fresh: bool = False,
    budget: float | None = None,
) -> work.Outcome:
    """Measure cases and print them; the rows are written case by case, so that a run can go on."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    warnings.simplefilter("ignore")
    before = {row.key: row for row in results.read(path)}

    def measure(case: cases.Case, say: work.Report) -> None:
        results.replace(path, harness.measure(case, list(chosen), device, plan, say))

    settings = {
        "cases": [case.name for case in wanted],
        "rivals": [rival.name for rival in chosen],
        "plan": asdict(plan),
        "output": str(path),
    }
    part = f"steps-{device.type}-{torch.get_num_threads()}-{plan.allocator}"
    todo = {case.name: partial(measure, case) for case in wanted}
    outcome = work.off(todo, part, settings, fresh=fresh, budget=budget)
    here = results.Environment.here(device, plan.allocator)
    names = {case.name for case in wanted}
    show([r for r in results.read(path) if r.case in names and r.measured_on(here)], before)
    return outcome


def show(rows: list[results.Row], before: dict[tuple[str, ...], results.Row]) -> None:
    """Print rows as a table, what could not run, and how ours moved."""
    table = Table(*report.heads(), title="time / memory over the ordinary step")
    for line in report.lines(rows):
        table.add_row(*line)
    work.console.print(table)
    for row in rows:
        if row.status != "ok":
            text = f"{row.case}, {row.rival}: {row.status}"
            work.console.print(text, highlight=False, markup=False)
        earlier = before.get(row.key)
        if row.rival == "ours" and earlier and earlier.best_ratio and row.best_ratio:
            text = f"{row.case}: {row.best_ratio:.2f}, was {earlier.best_ratio:.2f} at "
            work.console.print(text + earlier.commit, highlight=False)
