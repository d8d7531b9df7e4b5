"""Working off a part's items: finished ones are remembered, a time budget bounds each run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import results

STATE = Path(__file__).resolve().parents[1] / "build" / "bench"
console = Console(width=max(150, shutil.get_terminal_size().columns))
#: called with what is being done and the share of the item that is done
Report = Callable[[str, float], None]
#: measures one item and writes its rows
Item = Callable[[Report], None]


@dataclass(frozen=True)
class Outcome:
    """What a run came to: names of items."""

    failed: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every item has its rows."""
        return not self.failed and not self.left


class Memory:
    """Which items an interrupted run has finished.

    A run with other settings, or at another commit, starts anew.
    """

    def __init__(self, path: Path, settings: Mapping[str, object], fresh: bool = False):
        self._path = path
        self._settings = json.loads(json.dumps({**settings, "commit": results.commit()}))
        self.done: list[str] = []
        if path.exists() and not fresh:
            earlier = json.loads(path.read_text())
            if earlier["settings"] == self._settings:
                self.done = earlier["done"]

    def add(self, item: str) -> None:
        """Remember that an item's rows are written."""
        self.done.append(item)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"settings": self._settings, "done": self.done}))

    def finish(self) -> None:
        """Nothing is left to go on with."""
        self._path.unlink(missing_ok=True)


def off(
    items: Mapping[str, Item],
    part: str,
    settings: Mapping[str, object],
    *,
    fresh: bool = False,
    budget: float | None = None,
) -> Outcome:
    """Run the items that an earlier run with these settings, at this commit, has not finished.

    None is begun once `budget` seconds have passed; `fresh` forgets the earlier run.
    An item that raises ``RuntimeError`` or ``ValueError`` is reported and the others go on.
    """
    memory = Memory(STATE / f"{part}.json", settings, fresh)
    began, failed, left = time.monotonic(), [], []
    columns = (
        TextColumn("{task.description}", justify="left"),
        BarColumn(),
        TextColumn("{task.completed:.1f}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(items))
        for index, (name, item) in enumerate(items.items()):
            if name in memory.done:
                continue
            if budget is not None and time.monotonic() - began > budget:
                left.append(name)
                continue

            def say(what: str, share: float, index: int = index, name: str = name) -> None:
                progress.update(task, description=f"{name}: {what}", completed=index + share)

            say("", 0.0)
            try:
                item(say)
            except (RuntimeError, ValueError) as error:
                failed.append(name)
                progress.console.print(f"{name}: {error}", highlight=False, markup=False)
                continue
            memory.add(name)
        progress.update(task, description="", completed=len(items) - len(left))
    outcome = Outcome(tuple(failed), tuple(left))
    if left:
        names = ", ".join(left)
        console.print(
            f"{budget:.0f} s are over; left for the same command again: {names}",
            highlight=False,
            markup=False,
        )
    if outcome.complete:
        memory.finish()
    return outcome
