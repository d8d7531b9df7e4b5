"""What a person sees while a run is on: rich bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dpkernels.training.privacy import PrivacyPlan, StepStatistics

_SECONDS_BETWEEN_LINES = 10.0
_SMOOTHING = 0.9


class TrainingBar:
    """Takes in steps as they are taken; shows nothing.

    Epsilon so far is computed no more often than its cost allows (5 % of the time).

    Args:
        plan: privacy of the run.
        done: steps taken before.
        on_step: called after each step.
    """

    def __init__(
        self, plan: PrivacyPlan, done: int, on_step: Callable[[], None] = lambda: None
    ) -> None:
        self._plan = plan
        self._on_step = on_step
        self._steps = done
        self._next = 0.0
        self.latest: float | None = None

    def advance(self, statistics: StepStatistics) -> float | None:
        """Count one more step; epsilon when it was computed for this step, else None."""
        self._steps += 1
        self._on_step()
        began = time.monotonic()
        last = self._steps == self._plan.steps
        if not self._plan.enabled or (began < self._next and not last):
            return None
        self.latest = self._plan.epsilon(self._steps)
        self._next = time.monotonic() + 20 * (time.monotonic() - began)
        return self.latest


class Display:
    """Where progress goes: the base class of all displays, which shows nothing."""

    @contextlib.contextmanager
    def counting(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar over `total` items; yields the function that advances it."""
        yield lambda: None

    @contextlib.contextmanager
    def training(self, plan: PrivacyPlan, done: int) -> Iterator[TrainingBar]:
        """A bar over the planned steps, of which `done` are taken."""
        yield TrainingBar(plan, done)


class ConsoleDisplay(Display):
    """Bars on a terminal; a line every ten seconds where there is none."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextlib.contextmanager
    def counting(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """See `Display`."""
        with self._progress() as progress:
            task = progress.add_task(title, total=total, shown="")
            yield lambda: progress.advance(task)
        if not self._console.is_terminal:
            self._console.print(f"{title}: {total} done")

    @contextlib.contextmanager
    def training(self, plan: PrivacyPlan, done: int) -> Iterator[TrainingBar]:
        """See `Display`."""
        with self._progress() as progress:
            yield _ConsoleTrainingBar(self._console, progress, plan, done)

    def _progress(self) -> Progress:
        return bars(self._console, MofNCompleteColumn(), TextColumn("{task.fields[shown]}"))


def bars(console: Console | None, *counts: ProgressColumn) -> Progress:
    """Bars with the time taken and left; shown on terminals only.

    Args:
        console: where to; None: nowhere.
        *counts: columns that say how far a bar has come.
    """
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        *counts,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=console is None or not console.is_terminal,
    )


class _ConsoleTrainingBar(TrainingBar):
    def __init__(self, console: Console, progress: Progress, plan: PrivacyPlan, done: int) -> None:
        super().__init__(plan, done)
        self._console, self._progress = console, progress
        self._task = progress.add_task("Training", total=plan.steps, completed=done, shown="")
        self._loss: float | None = None
        self._clipped: float | None = None
        self._began, self._first = time.monotonic(), done
        self._line = self._began + _SECONDS_BETWEEN_LINES

    def advance(self, statistics: StepStatistics) -> float | None:
        """See `TrainingBar`."""
        epsilon = super().advance(statistics)
        self._loss = _smooth(self._loss, statistics.loss)
        self._clipped = _smooth(self._clipped, statistics.clipped_fraction)
        shown = self._text()
        self._progress.update(self._task, advance=1, shown=shown)
        now = time.monotonic()
        last = self._steps == self._plan.steps
        if not self._console.is_terminal and (now >= self._line or last):
            self._line = now + _SECONDS_BETWEEN_LINES
            left = (
                (now - self._began) / (self._steps - self._first) * (self._plan.steps - self._steps)
            )
            self._console.print(
                f"step {self._steps}/{self._plan.steps}  {shown}  {left:.0f} s left",
                highlight=False,
            )
        return epsilon

    def _text(self) -> str:
        parts = []
        if self._loss is not None:
            parts.append(f"loss {self._loss:.3f}")
        if self.latest is not None:
            parts.append(f"epsilon {self.latest:.3g}")
        if self._clipped is not None:
            parts.append(f"clipped {self._clipped:.0%}")
        return "  ".join(parts)


def _smooth(old: float | None, new: float | None) -> float | None:
    if old is None or new is None:
        return new if old is None else old
    return _SMOOTHING * old + (1 - _SMOOTHING) * new
