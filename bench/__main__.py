"""``python -m bench``: measure, write the rows, and make the table and the pictures from them."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bench import cases, harness, memory, profiling, report, results, rivals
from bench.harness import Plan

_ROOT = Path(__file__).resolve().parents[1]
_STATE = _ROOT / "build" / "bench"
_PLANS = {
    "cpu": Plan(seconds=10.0),
    "quick": Plan(seconds=4.0, least=3, most=20),
    "gpu": Plan(seconds=8.0, least=5, most=40),
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console(width=max(150, shutil.get_terminal_size().columns))


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    quick: Annotated[bool, typer.Option(help="Small cases, under three minutes.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU.")] = 1,
    case: Annotated[list[str] | None, typer.Option(help="Only this case (repeatable).")] = None,
    rival: Annotated[list[str] | None, typer.Option(help="Only this rival (repeatable).")] = None,
    seconds: Annotated[float | None, typer.Option(help="Timed seconds per case.")] = None,
    fresh: Annotated[bool, typer.Option(help="Do not go on with an interrupted run.")] = False,
    keep_memory: Annotated[
        bool, typer.Option(help="Keep freed memory in the process, as jemalloc does.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="CSV to update.")] = None,
) -> None:
    """Measure every case and rival; rows are written case by case, so that a run can go on."""
    if context.invoked_subcommand:
        return
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    warnings.simplefilter("ignore")
    suite = "quick" if quick else {"cuda": "gpu"}.get(device, "cpu")
    plan = _PLANS[suite]
    if seconds is not None:
        plan = replace(plan, seconds=seconds)
    if keep_memory and memory.keep_freed():
        plan = replace(plan, allocator="kept")
    try:
        wanted = cases.find(case or [], suite)
        chosen = rivals.find(rival or [])
        target = torch.device(device)
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from None
    path = output or results.RESULTS / ("quick.csv" if quick else "steps.csv")
    before = {row.key: row for row in results.read(path)}
    settings = {"rivals": [r.name for r in chosen], "plan": asdict(plan), "output": str(path)}
    state = _State(
        _STATE / f"{suite}-{device}-{threads}-{plan.allocator}.json", settings, fresh or bool(case)
    )
    failed = _measure(wanted, chosen, target, plan, path, state)
    here = results.Environment.here(target, plan.allocator)
    names = {case.name for case in wanted}
    rows = [row for row in results.read(path) if row.case in names and row.measured_on(here)]
    _show(rows, before)
    if output is None and not quick:
        _write_reports(path)
    if failed:
        raise typer.Exit(1)
    state.finish()


@app.command("report")
def make_report(
    source: Annotated[Path, typer.Option(help="CSV with the rows.")] = results.RESULTS
    / "steps.csv",
    short: Annotated[bool, typer.Option(help="Only print a table.")] = False,
) -> None:
    """Make the README's table and the pictures again from the rows."""
    rows = results.read(source)
    if short:
        _show(rows, {})
        return
    print(report.markdown(rows))
    _write_reports(source)


@app.command()
def profile(
    case: str,
    rival: Annotated[str, typer.Option(help="Which rival.")] = "ours",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    device: str = "cpu",
    steps: Annotated[int, typer.Option(min=1, help="Steps under the profiler.")] = 3,
    rows: Annotated[int, typer.Option(min=1, help="Lines of the table.")] = 25,
) -> None:
    """Where a step spends more than the ordinary one, by operator and by function."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    workload = cases.find([case], "")[0].build(torch.device(device))
    chosen = {r.name: r.prepare(workload, rivals.Privacy(1.0, 1.0)) for r in rivals.find([rival])}
    operators = profiling.by_operator(chosen, steps, device)
    table = Table("operator", "ordinary, ms", f"{rival}, ms", "extra, ms", title=case)
    for name, *figures in profiling.extra(operators, rival)[:rows]:
        table.add_row(name, *(f"{figure:.2f}" for figure in figures))
    sums = [sum(operators[name].values()) for name in ("ordinary", rival)]
    table.add_row("sum", *(f"{t:.2f}" for t in (*sums, sums[1] - sums[0])))
    console.print(table)
    table = Table("function", "own ms")
    for name, figure in profiling.by_function(chosen[rival], steps)[:rows]:
        table.add_row(name, f"{figure:.2f}")
    console.print(table)


class _State:
    """Which cases an interrupted run has finished; a run with other settings starts anew."""

    def __init__(self, path: Path, settings: dict[str, object], fresh: bool):
        self._path, self._settings = path, settings
        self.done: list[str] = []
        if path.exists() and not fresh:
            earlier = json.loads(path.read_text())
            if earlier["settings"] == settings:
                self.done = earlier["done"]

    def add(self, case: str) -> None:
        """Remember that a case's rows are written."""
        self.done.append(case)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"settings": self._settings, "done": self.done}))

    def finish(self) -> None:
        """Nothing is left to go on with."""
        self._path.unlink(missing_ok=True)


def _measure(
    wanted: list[cases.Case],
    chosen: list[rivals.Rival],
    device: torch.device,
    plan: Plan,
    path: Path,
    state: _State,
) -> bool:
    """Write the rows of every case that an interrupted run has not finished; True if one failed."""
    failed = False
    columns = (
        TextColumn("{task.description}", justify="left"),
        BarColumn(),
        TextColumn("{task.completed:.1f}/{task.total} cases"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=600) as progress:
        task = progress.add_task("", total=len(wanted))
        for index, case in enumerate(wanted):
            if case.name in state.done:
                continue

            def say(what: str, share: float, index: int = index, name: str = case.name) -> None:
                progress.update(task, description=f"{name}: {what}", completed=index + share)

            try:
                found = harness.measure(case, chosen, device, plan, say)
            except RuntimeError as error:
                failed = True
                progress.console.print(f"{case.name}: {error}", highlight=False, markup=False)
                continue
            results.replace(path, found)
            state.add(case.name)
        progress.update(task, description="done", completed=len(wanted))
    return failed


def _show(rows: list[results.Row], before: dict[tuple[str, ...], results.Row]) -> None:
    table = Table(*report.heads(), title="time / memory over the ordinary step")
    for line in report.lines(rows):
        table.add_row(*line)
    console.print(table)
    for row in rows:
        if row.status != "ok":
            console.print(f"{row.case}, {row.rival}: {row.status}", highlight=False, markup=False)
        earlier = before.get(row.key)
        if row.rival == "ours" and earlier and earlier.best_ratio and row.best_ratio:
            console.print(
                f"{row.case}: {row.best_ratio:.2f}, was {earlier.best_ratio:.2f} "
                f"at {earlier.commit}",
                highlight=False,
            )


def _write_reports(path: Path) -> None:
    rows = results.read(path)
    for picture in report.plot(rows, path.parent):
        console.print(f"wrote {picture}", highlight=False)
    if not report.write(_ROOT / "README.md", rows):
        console.print(f"README.md has no {report.BEGIN} ... {report.END}: table not written")


if __name__ == "__main__":
    app()
