"""``python -m bench``: measure, write the rows, and make the table and the pictures from them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from bench import (
    accounting_bench,
    cases,
    digest,
    explain,
    kernels,
    memory,
    noise_bench,
    ops_bench,
    profiling,
    regret,
    report,
    results,
    rivals,
    roofline,
    scaling,
    steps,
    table,
    trace,
    work,
)

_ROOT = Path(__file__).resolve().parents[1]
#: seconds after which `all` stops what is running: `make bench` promises half an hour
_WHOLE = 1740.0
#: and how many times its usual seconds a part may take, on a slow or busy machine
_PATIENCE = 2.0
#: seconds in which a part that is asked to stop may do so
_GRACE = 10.0
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = work.console

_Budget = Annotated[
    float | None, typer.Option(help="Seconds after which nothing more is begun; repeat to go on.")
]
_Limit = Annotated[
    float | None,
    typer.Option(
        help=f"Seconds after which a rival or case under way ends the process with {work.HUNG}; "
        f"default: {work.PIECE_SECONDS_ON_GPU:.0f} on a GPU."
    ),
]
_Device = Annotated[str, typer.Option(help="cpu or cuda.")]
_Only = Annotated[list[str] | None, typer.Option(help="Only this case (repeatable).")]
_Fresh = Annotated[bool, typer.Option(help="Do not go on with an interrupted run.")]


@dataclass(frozen=True)
class _Part:
    """A command of ``python -m bench all`` and about how long it takes on a quiet core."""

    command: tuple[str, ...]
    seconds: float
    what: str


_PARTS = (
    _Part(("ops",), 80, "per-sample gradient ops against the library's batch gradient"),
    _Part(("roofline",), 30, "each op against what the core can do"),
    _Part(("noise",), 70, "throughput, moments, distribution and tails of the noise"),
    _Part(("accounting",), 80, "time and tightness of the accountants"),
    _Part(("regret",), 140, "the planner's choice against the best measured one"),
    _Part(("time-to-dice", "--repetitions", "3"), 140, "whole training runs, ours against Opacus"),
    _Part(("scaling", "--coarse"), 180, "time and memory against one quantity at a time"),
    _Part(("steps",), 1000, "whole steps of every case and rival"),
)


@app.callback(invoke_without_command=True)
def default(
    context: typer.Context,
    quick: Annotated[bool, typer.Option(help="Small cases, under three minutes.")] = False,
    device: _Device = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU.")] = 1,
    case: _Only = None,
    one_pass: Annotated[
        str | None,
        typer.Option("--pass", help="first: ours and the loop; second: the other rivals."),
    ] = None,
    rival: Annotated[list[str] | None, typer.Option(help="Only this rival (repeatable).")] = None,
    seconds: Annotated[float | None, typer.Option(help="Timed seconds per case.")] = None,
    budget: _Budget = None,
    item_seconds: _Limit = None,
    fresh: _Fresh = False,
    everyone: Annotated[
        bool,
        typer.Option(help="Also the rivals that a case leaves out as slow; so with --rival."),
    ] = False,
    keep_memory: Annotated[
        bool, typer.Option(help="Keep freed memory in the process, as jemalloc does.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="CSV to update.")] = None,
) -> None:
    """Whole steps: measure every case and rival. The same as the command `steps`."""
    if context.invoked_subcommand:
        return
    torch.set_num_threads(threads)
    suite = "quick" if quick else {"cuda": "gpu"}.get(device, "cpu")
    plan = replace(steps.PLANS[suite], everyone=everyone or bool(rival))
    if seconds is not None:
        plan = replace(plan, seconds=seconds)
    if keep_memory and memory.keep_freed():
        plan = replace(plan, allocator="kept")
    if one_pass and rival:
        raise typer.BadParameter(f"--pass {one_pass}: expected without --rival")
    try:
        wanted = cases.find(case or [], suite)
        chosen = steps.of_pass(one_pass) if one_pass else rivals.find(rival or [])
        target = results.usable(device)
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from None
    path = output or results.RESULTS / ("quick.csv" if quick else "steps.csv")
    outcome = steps.run(
        wanted,
        chosen,
        target,
        plan,
        path,
        fresh=fresh,
        budget=budget,
        piece_seconds=work.piece_seconds(item_seconds, target),
    )
    if output is None and not quick:
        _write_reports()
    _exit(outcome)


@app.command("steps")
def run_steps(budget: _Budget = None, fresh: _Fresh = False) -> None:
    """Whole steps of every CPU case and rival, one thread."""
    torch.set_num_threads(1)
    wanted, chosen = cases.find([], "cpu"), rivals.find([])
    plan = steps.PLANS["cpu"]
    device = torch.device("cpu")
    _exit(steps.run(wanted, chosen, device, plan, steps.PATH, fresh=fresh, budget=budget))


@app.command("scaling")
def run_scaling(
    curve: Annotated[list[str] | None, typer.Option(help="Only this curve (repeatable).")] = None,
    coarse: Annotated[bool, typer.Option(help="Every second point.")] = False,
    budget: _Budget = None,
    fresh: _Fresh = False,
) -> None:
    """Time and memory against batch, volume side, length, width, depth, parameters."""
    try:
        outcome = scaling.run(tuple(curve or ()), coarse, budget, fresh)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _exit(outcome)


@app.command("regret")
def run_regret(budget: _Budget = None, fresh: _Fresh = False) -> None:
    """The planner's choice against the best measured candidate, shape by shape."""
    outcome = regret.run(budget, fresh)
    _print(digest.regret(regret.PATH))
    _exit(outcome)


@app.command("ops")
def run_ops(budget: _Budget = None, fresh: _Fresh = False) -> None:
    """Per-sample gradient ops against the library's gradient of the batch."""
    _exit(ops_bench.run(budget, fresh))


@app.command("roofline")
def run_roofline(budget: _Budget = None, fresh: _Fresh = False) -> None:
    """Each op against the memory bandwidth and the matrix rate of this core."""
    outcome = roofline.run(budget, fresh)
    _print(digest.roofline(roofline.PATH))
    _exit(outcome)


@app.command("noise")
def run_noise(
    draws: Annotated[int, typer.Option(min=1000, help="Normals.")] = noise_bench.DRAWS,
    budget: _Budget = None,
    fresh: _Fresh = False,
) -> None:
    """Throughput, moments, distribution and tails of the Gaussian noise."""
    outcome = noise_bench.run(budget, fresh, draws)
    _print(digest.noise(noise_bench.PATH))
    _exit(outcome)


@app.command("accounting")
def run_accounting(
    limit: Annotated[float, typer.Option(help="Seconds per question.")] = accounting_bench.LIMIT_S,
    budget: _Budget = None,
    fresh: _Fresh = False,
) -> None:
    """Time, memory and tightness of our accountant, Opacus' three and Google's."""
    outcome = accounting_bench.run(budget, fresh, limit)
    _print(digest.accounting(accounting_bench.PATH))
    _exit(outcome)


@app.command("time-to-dice")
def run_dice(
    repetitions: Annotated[int, typer.Option(min=1)] = 5,
    budget: _Budget = None,
    fresh: _Fresh = False,
) -> None:
    """Whole training runs to a Dice of 0.70 at epsilon 8, ours against Opacus."""
    from bench import dice  # its phantom needs the trainer's packages, nothing else here does

    outcome = dice.run(repetitions, budget, fresh)
    _print(digest.dice(dice.PATH))
    _exit(outcome)


@app.command("all")
def run_all(
    seconds: Annotated[float, typer.Option(help="Stop after these.")] = _WHOLE,
    fresh: _Fresh = False,
) -> None:
    """Every part in turn, under half an hour; the same command goes on where it stopped."""
    done = work.Memory(work.STATE / "all.json", {"parts": [p.command for p in _PARTS]}, fresh)
    plan = Table("part", "about", "what", "", title=f"at most {seconds:.0f} s")
    for part in _PARTS:
        state = "done" if part.command[0] in done.done else ""
        plan.add_row(part.command[0], f"{part.seconds:.0f} s", part.what, state)
    console.print(plan)
    began, left = time.monotonic(), []
    for part in _PARTS:
        name, remaining = part.command[0], seconds - (time.monotonic() - began)
        if name in done.done:
            continue
        console.rule(f"{name}: {part.what}")
        limit = min(remaining, _PATIENCE * part.seconds)
        if limit > 0 and _finished(part, limit, fresh):
            done.add(name)
        else:
            left.append(name)
    _write_reports()
    if left:
        console.print(f"not finished: {', '.join(left)}; the same command goes on with them")
        raise typer.Exit(1)
    done.finish()


@app.command("report")
def make_report(
    source: Annotated[Path, typer.Option(help="CSV with the rows of steps.")] = steps.PATH,
    short: Annotated[bool, typer.Option(help="Only print a table.")] = False,
) -> None:
    """Make the README's tables, those of the notes and the pictures again from the rows."""
    if short:
        steps.show(results.read(source), {})
        return
    _write_reports(source)


@app.command("trace")
def run_trace(
    output: Annotated[Path, typer.Argument(help="CSV to update.")],
    device: _Device = "cpu",
    case: _Only = None,
    budget: _Budget = None,
    item_seconds: _Limit = None,
    fresh: _Fresh = False,
) -> None:
    """A step kernel by kernel, ours and the ordinary one: three cases of a GPU, or small ones."""
    target = _usable(device)
    wanted = _found(case or (trace.CASES if target.type == "cuda" else ()), "quick")
    limit = work.piece_seconds(item_seconds, target)
    _exit(trace.run(wanted, target, output, fresh=fresh, budget=budget, piece_seconds=limit))


@app.command("explain")
def run_explain(
    output: Annotated[Path, typer.Argument(help="CSV to update.")],
    device: _Device = "cpu",
    case: _Only = None,
    budget: _Budget = None,
    item_seconds: _Limit = None,
    fresh: _Fresh = False,
) -> None:
    """What the planner decides in every case of a GPU, or in the small ones."""
    target = _usable(device)
    wanted = _found(case or (), "gpu" if target.type == "cuda" else "quick")
    limit = work.piece_seconds(item_seconds, target)
    _exit(explain.run(wanted, target, output, fresh=fresh, budget=budget, piece_seconds=limit))


@app.command()
def adopt(
    folder: Annotated[Path, typer.Argument(help="Where bench/gpu.sh wrote its CSV files.")],
) -> None:
    """Put the rows of another machine among ours, and make tables and pictures again."""
    keys = {
        "steps.csv": (results.KEY, ()),
        "kernels.csv": (kernels.KEY, ()),
        "trace.csv": (trace.KEY, trace.KEY[:-1]),
        "explain.csv": (explain.KEY, explain.KEY[:-2]),
    }
    there = [name for name in keys if (folder / name).exists()]
    if not there:
        raise typer.BadParameter(f"{folder}: expected a folder with one of {', '.join(keys)}")
    for name in there:
        rows = table.read(folder / name)
        table.replace(results.RESULTS / name, rows, *keys[name])
        console.print(f"took {len(rows)} rows of {folder / name}", highlight=False)
    _write_reports()


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


def _usable(device: str) -> torch.device:
    try:
        return results.usable(device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _found(names: Sequence[str], suite: str) -> list[cases.Case]:
    try:
        return cases.find(list(names), suite)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _finished(part: _Part, limit: float, fresh: bool) -> bool:
    """Whether the part, in a process of its own, came to its end within `limit` seconds."""
    command = [sys.executable, "-m", "bench", *part.command, *(["--fresh"] if fresh else [])]
    with subprocess.Popen(command, cwd=_ROOT) as process:
        try:
            return process.wait(limit) == 0
        except subprocess.TimeoutExpired:
            process.terminate()  # in order, or what is under way would not be tried again
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
            process.kill()
            return False


def _write_reports(source: Path = steps.PATH) -> None:
    for written in report.write_all(_ROOT, results.read(source)):
        console.print(f"wrote {written}", highlight=False)


def _print(lines: list[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _exit(outcome: work.Outcome) -> None:
    if not outcome.complete:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
