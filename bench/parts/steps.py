"""Whole training steps, case by case: ours, the ordinary step and every rival."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated

import typer

from bench import cases, harness, memory, report, results, rivals, table, work
from bench.harness import Plan
from bench.part import How, Only, Part, Row, Todo

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
    table.require_known("pass", [which], PASSES)
    others = [r.name for r in rivals.PRIVATE if r.name not in FIRST]
    return rivals.find(list(FIRST) if which == "first" else others)


def todo(
    how: How,
    quick: Annotated[bool, typer.Option(help="Small cases, under three minutes.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU.")] = 1,
    case: Only = None,
    one_pass: Annotated[
        str | None,
        typer.Option("--pass", help="first: ours and the loop; second: the other rivals."),
    ] = None,
    rival: Annotated[list[str] | None, typer.Option(help="Only this rival (repeatable).")] = None,
    seconds: Annotated[float | None, typer.Option(help="Timed seconds per case.")] = None,
    everyone: Annotated[
        bool,
        typer.Option(help="Also the rivals that a case leaves out as slow; so with --rival."),
    ] = False,
    keep_memory: Annotated[
        bool, typer.Option(help="Keep freed memory in the process, as jemalloc does.")
    ] = False,
) -> Todo:
    """The cases that these options name, each with the rivals that they name."""
    suite = "quick" if quick else {"cuda": "gpu"}.get(how.device.type, "cpu")
    plan = replace(PLANS[suite], everyone=everyone or bool(rival))
    if seconds is not None:
        plan = replace(plan, seconds=seconds)
    if one_pass and rival:
        raise ValueError(f"--pass {one_pass}: expected without --rival")
    wanted = cases.find(case or [], suite)
    chosen = of_pass(one_pass) if one_pass else rivals.find(rival or [])
    if quick and how.output == PART.path:
        how = replace(how, output=results.RESULTS / "quick.csv")
    if keep_memory and memory.keep_freed():
        how = replace(how, allocator="kept")
    return of_cases(wanted, chosen, plan, replace(how, threads=threads))


def of_cases(
    wanted: Sequence[cases.Case], chosen: Sequence[rivals.Rival], plan: Plan, how: How
) -> Todo:
    """Cases and what prints them; the rows are written case by case, so that a run can go on.

    A run without ours, as the second pass is, leaves an ordinary step's row of the same commit in
    its place, since the ratios of ours were taken to that one.
    On a GPU, ours and the ordinary step are profiled for the column `busy` when all is timed: the
    profiler may leave launches slower than it found them.
    """
    before = {row.key: row for row in results.read(how.output)}
    names = [rival.name for rival in chosen]
    end = None if how.budget is None else time.monotonic() + how.budget
    listed = {case.name: case for case in wanted}

    def own(case: cases.Case) -> list[results.Row]:
        """Its rows of this commit."""
        commit = results.commit()
        return [r for r in _measured(how) if r.case == case.name and r.commit == commit]

    def measure(case: cases.Case, report: work.Report) -> Iterator[list[Row]]:
        rows = harness.measure(case, list(chosen), how.device, _until(plan, end), report)
        done = {row.rival for row in own(case) if row.status == "ok"}
        if "ours" not in names and "ordinary" in done:
            rows = [row for row in rows if row.rival != "ordinary"]
        yield [asdict(row) for row in rows]

    def profile(case: cases.Case, report: work.Report) -> Iterator[list[Row]]:
        if rows := own(case):
            yield [asdict(row) for row in harness.profiled(rows, case, how.device, report)]

    def lost(item: str, status: str) -> list[Row]:
        """Rows of a case that ended the process before its first rival was begun."""
        if item not in listed:
            return []
        return [asdict(row) for row in harness.unmeasured(listed[item], list(chosen), status)]

    items = {name: partial(measure, case) for name, case in listed.items()}
    if how.device.type == "cuda" and "ours" in names:
        items |= {f"{name}, profile": partial(profile, case) for name, case in listed.items()}
    return Todo(
        items, how, lost, lambda: show([r for r in _measured(how) if r.case in listed], before)
    )


def _measured(how: How) -> list[results.Row]:
    """The rows of the same device, threads and allocator."""
    here = how.here()
    return [row for row in results.read(how.output) if row.measured_on(here)]


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
    work.say_table(report.heads(), report.lines(rows), "time / memory over the ordinary step")
    for row in rows:
        if row.busy is not None:
            text = f"{row.case}, {row.rival}: {row.ms:.2f} ms, GPU busy {row.busy:.0%} of it, "
            work.say(f"{text}Python returns after {row.host_ms:.2f} ms")
        if row.status != "ok":
            work.say(f"{row.case}, {row.rival}: {row.status}")
        earlier = before.get(row.key)
        if (
            row.rival == "ours"
            and earlier not in (None, row)
            and earlier.best_ratio
            and row.best_ratio
        ):
            text = f"{row.case}: {row.best_ratio:.2f}, was {earlier.best_ratio:.2f} at "
            work.say(text + earlier.commit)


PART = Part(
    "steps",
    "Whole steps of every case and rival.",
    results.KEY,
    todo,
    seconds=1000.0,
    on_gpu=True,
)
