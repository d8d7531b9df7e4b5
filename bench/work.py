"""Working off a part's items: finished ones are remembered, a time budget bounds each run.

What is under way is written down before it begins. So a run that goes on after its process was
ended (by a signal, an error of the GPU, a wait without end) knows what did it, and leaves that out.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import results, timing

STATE = Path(__file__).resolve().parents[1] / "build" / "bench"
#: exit codes of a process that must be started again to go on: the GPU refuses it from now on, or
#: something took longer than it may
GPU_LOST, HUNG = 86, 87
#: seconds that a piece of an item may take on a GPU, compilation included
PIECE_SECONDS_ON_GPU = 60.0
_UNKNOWN = "exit status unknown"
console = Console(width=max(150, shutil.get_terminal_size().columns))


def say(*lines: str) -> None:
    """Print lines as they are."""
    for line in lines:
        console.print(line, highlight=False, markup=False)


def say_table(heads: Iterable[str], lines: Iterable[Iterable[object]], title: str = "") -> None:
    """Print a table."""
    shown = Table(*heads, title=title)
    for line in lines:
        shown.add_row(*map(str, line))
    console.print(shown)


class Report:
    """What an item tells of itself while it is measured; this one tells nobody.

    Attributes:
        ended: by piece of the item (a rival, a backend), the status of one that has ended an
            earlier process: the item must not begin it again.
        elsewhere: the same of every item, by its name.
    """

    ended: Mapping[str, str] = MappingProxyType({})
    elsewhere: Mapping[str, Mapping[str, str]] = MappingProxyType({})

    def __call__(self, what: str, share: float) -> None:
        """What is being done, and the share of the item that is done."""

    def begin(self, piece: str) -> None:
        """From now on this piece of the item is under way."""


SILENT = Report()
#: measures one item and writes its rows
Item = Callable[[Report], None]


@dataclass(frozen=True)
class Outcome:
    """What a run came to: names of items, of pieces after a colon."""

    failed: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    ended: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every item has its rows."""
        return not (self.failed or self.left or self.ended)


class Memory:
    """Which items an interrupted run has finished, and which pieces of items have ended it.

    A run with other settings, or at another commit, starts anew. A piece without a name is what an
    item does before its first one.

    Attributes:
        done: finished items.
        ended: by item and piece, the status of what has ended a process.
    """

    def __init__(self, path: Path, settings: Mapping[str, object], fresh: bool = False):
        self._path = path
        self._settings = json.loads(json.dumps({**settings, "commit": results.commit()}))
        self.done: list[str] = []
        self.ended: dict[str, dict[str, str]] = {}
        self._under_way: list[str] | None = None
        if path.exists() and not fresh:
            earlier = json.loads(path.read_text())
            if earlier["settings"] == self._settings:
                self.done, self.ended = earlier["done"], earlier["ended"]
                self._under_way = earlier["under_way"]
        self.blame(_UNKNOWN)

    def begin(self, item: str, piece: str) -> None:
        """Remember what is under way, in the place of what was."""
        self._under_way = [item, piece]
        self._write()

    def rest(self) -> None:
        """Nothing is under way."""
        self._under_way = None
        self._write()

    def blame(self, reason: str) -> None:
        """What is under way ends the process: remember it, so that it is not begun again."""
        if self._under_way is not None:
            item, piece = self._under_way
            status = f"ended the process ({reason}): not tried again"
            self.ended.setdefault(item, {})[piece] = status
            self.rest()

    def add(self, item: str) -> None:
        """Remember that an item's rows are written."""
        self.done.append(item)
        self.rest()

    def finish(self) -> None:
        """Nothing is left to go on with."""
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        state = {
            "settings": self._settings,
            "done": self.done,
            "under_way": self._under_way,
            "ended": self.ended,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(state))
        partial.replace(self._path)


class _Watched(Report):
    """An item of a run: shown, its pieces remembered, each with a limit of seconds."""

    def __init__(
        self, item: str, memory: Memory, show: Callable[[str, float], None], limit: float | None
    ):
        self.ended, self.elsewhere = memory.ended.get(item, {}), memory.ended
        self._item, self._memory, self._show, self._limit = item, memory, show, limit
        self._timer: threading.Timer | None = None

    def __call__(self, what: str, share: float) -> None:
        self._show(what, share)

    def begin(self, piece: str) -> None:
        self.stop()
        self._memory.begin(self._item, piece)
        if self._limit is not None:
            self._timer = threading.Timer(self._limit, self._hung)
            self._timer.daemon = True
            self._timer.start()

    def stop(self) -> None:
        """Nothing is timed any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _hung(self) -> None:
        """Say where every thread is, and end the process, whatever it waits for."""
        self._memory.blame(f"no end within {self._limit:g} s")
        print(f"{self._item}: no end within {self._limit:g} s", file=sys.__stderr__)
        faulthandler.dump_traceback(file=sys.__stderr__)
        os._exit(HUNG)


def off(
    items: Mapping[str, Item],
    part: str,
    settings: Mapping[str, object],
    *,
    fresh: bool = False,
    budget: float | None = None,
    piece_seconds: float | None = None,
    lost: Callable[[str, str], None] | None = None,
) -> Outcome:
    """Run the items that an earlier run with these settings, at this commit, has not finished.

    None is begun once `budget` seconds have passed; `fresh` forgets the earlier run.
    An item that raises ``RuntimeError`` or ``ValueError`` is reported and the others go on.
    What a process was at when it ended (other than by an interrupt or SIGTERM) is not begun again:
    a piece of an item is in the item's ``Report.ended``, an item that had begun no piece is handed
    to `lost` with its status.

    Args:
        piece_seconds: a piece that takes longer ends the process with exit code ``HUNG``.

    Raises:
        SystemExit: ``GPU_LOST``, where an error has ended the use of the GPU by this process.
    """
    memory = Memory(STATE / f"{part}.json", settings, fresh)
    began, failed, left = time.monotonic(), [], []
    columns = (
        TextColumn("{task.description}", justify="left"),
        BarColumn(),
        TextColumn("{task.completed:.1f}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress, _stopped_in_order():
        task = progress.add_task("", total=len(items))
        for index, (name, item) in enumerate(items.items()):
            if name in memory.done:
                continue
            if status := memory.ended.get(name, {}).get(""):
                if lost is not None:
                    lost(name, status)
                continue
            if budget is not None and time.monotonic() - began > budget:
                left.append(name)
                continue

            def show(what: str, share: float, index: int = index, name: str = name) -> None:
                progress.update(task, description=f"{name}: {what}", completed=index + share)

            show("", 0.0)
            report = _Watched(name, memory, show, piece_seconds)
            report.begin("")
            try:
                item(report)
            except (RuntimeError, ValueError) as error:
                report.stop()
                failed.append(name)
                say(f"{name}: {error}")
                if _lost_gpu(error):
                    memory.blame(str(error))
                    raise SystemExit(GPU_LOST) from error
                memory.rest()
            except BaseException:  # an interrupt, or a request to stop: nobody's fault
                report.stop()
                memory.rest()
                raise
            else:
                report.stop()
                memory.add(name)
        progress.update(task, description="", completed=len(items) - len(left))
    ended = [(i, p, s) for i in items for p, s in memory.ended.get(i, {}).items()]
    for name, piece, status in ended:
        say(f"{_named(name, piece)}: {status}")
    outcome = Outcome(tuple(failed), tuple(left), tuple(_named(i, p) for i, p, _ in ended))
    if left:
        names = ", ".join(left)
        say(f"{budget:.0f} s are over; left for the same command again: {names}")
    if outcome.complete:
        memory.finish()
    return outcome


def _named(item: str, piece: str) -> str:
    return f"{item}: {piece}" if piece else item


def _lost_gpu(error: Exception) -> bool:
    """Whether the GPU refuses this process from now on."""
    if isinstance(error, timing.GpuLost):
        return True
    try:
        if torch.cuda.is_initialized():
            timing.require_working(torch.device("cuda"), "")
    except timing.GpuLost:
        return True
    return False


@contextlib.contextmanager
def _stopped_in_order() -> Iterator[None]:
    """SIGTERM ends the process as an interrupt does, and not as what is under way might."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
