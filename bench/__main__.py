"""``python -m bench``: measure, write the rows, and make the table and the pictures from them.

Without a command, or with options alone: ``steps``.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from bench import report, table, work
from bench.part import Part
from bench.parts import accounting, dice, explain, noise, ops, regret, scaling, steps, trace, trial

_ROOT = Path(__file__).resolve().parents[1]
#: seconds after which `all` stops what is running: `make bench` promises half an hour
_WHOLE = 1740.0
#: and how many times its usual seconds a part may take, on a slow or busy machine
_PATIENCE = 2.0
#: seconds in which a part that is asked to stop may do so
_GRACE = 10.0
#: in the order of `all`, of the README and of the notes
PARTS: tuple[Part, ...] = (
    dice.PART,
    regret.PART,
    ops.PART,
    noise.PART,
    accounting.PART,
    scaling.PART,
    steps.PART,
    trial.PART,
    trace.PART,
    explain.PART,
)
console = work.console


class _Commands(TyperGroup):
    """Takes options without a command for those of `steps`."""

    def parse_args(self, context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] != "--help"):
            args = [steps.PART.name, *args]
        return super().parse_args(context, args)


app = typer.Typer(cls=_Commands, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command("all")
def run_all(
    seconds: Annotated[float, typer.Option(help="Stop after these.")] = _WHOLE,
    fresh: Annotated[bool, typer.Option(help="Do not go on with an interrupted run.")] = False,
) -> None:
    """Every part in turn, under half an hour; the same command goes on where it stopped."""
    parts = [(part, part.seconds) for part in PARTS if part.seconds is not None]
    done = work.Memory(work.STATE / "all.json", {"parts": [p.name for p, _ in parts]}, fresh)
    plan = [
        (part.name, f"{usual:.0f} s", part.what, "done" if part.name in done.done else "")
        for part, usual in parts
    ]
    work.say_table(("part", "about", "what", ""), plan, f"at most {seconds:.0f} s")
    began, left = time.monotonic(), []
    for part, usual in parts:
        if part.name in done.done:
            continue
        console.rule(f"{part.name}: {part.what}")
        limit = min(seconds - (time.monotonic() - began), _PATIENCE * usual)
        if limit > 0 and _finished(part, limit, fresh):
            done.add(part.name)
        else:
            left.append(part.name)
    _write_reports()
    if left:
        console.print(f"not finished: {', '.join(left)}; the same command goes on with them")
        raise typer.Exit(1)
    done.finish()


@app.command("report")
def make_report() -> None:
    """Make the README's tables, those of the notes and the pictures again from the rows."""
    _write_reports()


@app.command()
def adopt(
    folder: Annotated[Path, typer.Argument(help="Where bench/gpu.sh wrote its CSV files.")],
) -> None:
    """Put the rows of another machine among ours, and make tables and pictures again."""
    parts = {part.path.name: part for part in PARTS if part.on_gpu}
    there = [name for name in parts if (folder / name).exists()]
    if not there:
        raise typer.BadParameter(f"{folder}: expected a folder with one of {', '.join(parts)}")
    for name in there:
        rows = table.read(folder / name)
        table.replace(parts[name].path, rows, parts[name].key, parts[name].within)
        work.say(f"took {len(rows)} rows of {folder / name}")
    _write_reports()


def _finished(part: Part, limit: float, fresh: bool) -> bool:
    """Whether the part, in a process of its own, came to its end within `limit` seconds."""
    command = [sys.executable, "-m", "bench", part.name, *part.arguments]
    with subprocess.Popen([*command, *(["--fresh"] if fresh else [])], cwd=_ROOT) as process:
        try:
            return process.wait(limit) == 0
        except subprocess.TimeoutExpired:
            process.terminate()  # in order, or what is under way would not be tried again
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
            process.kill()
            return False


def _write_reports() -> None:
    for written in report.write_all(_ROOT, PARTS):
        work.say(f"wrote {written}")


def _measured(output: Path) -> None:
    """Reports follow the rows of steps."""
    if output == steps.PART.path:
        _write_reports()


for _part in PARTS:
    app.command(_part.name, help=_part.what)(_part.command(_measured))


if __name__ == "__main__":
    app()
