"""One bar for a whole study: every step of every training run, and every attack."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import TaskProgressColumn

from dpkernels.training.privacy import PrivacyPlan
from dpkernels.training.progress import Display, TrainingBar, bars

_SECONDS_BETWEEN_LINES = 30.0


class StudyDisplay(Display):
    """A display whose runs all advance the same bar.

    Reading and evaluating are not shown.

    Args:
        console: where to; None: nowhere.
        total: steps of all runs plus the weight of all attacks.
    """

    def __init__(self, console: Console | None, total: float) -> None:
        self._console = console
        self._total = total
        self._done = 0.0
        self._began = self._line = time.monotonic()
        self._skipped = 0.0
        self._title = ""
        self._progress = bars(console, TaskProgressColumn())
        self._task = self._progress.add_task("Study", total=total)

    def __enter__(self) -> StudyDisplay:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def title(self, text: str) -> None:
        """What is under way."""
        self._title = text
        self._progress.update(self._task, description=text)

    def advance(self, amount: float, *, skipped: bool = False) -> None:
        """Count work; `skipped`: it was done before and says nothing about the speed."""
        self._done += amount
        self._skipped += amount if skipped else 0.0
        self._progress.update(self._task, advance=amount)
        now = time.monotonic()
        if self._console is None or self._console.is_terminal or skipped:
            return
        if now - self._line >= _SECONDS_BETWEEN_LINES or math.isclose(self._done, self._total):
            self._line = now
            speed = (self._done - self._skipped) / (now - self._began)
            left = max(0.0, self._total - self._done) / speed
            self._console.print(
                f"{self._done / self._total:.0%}  {self._title}  about {left / 60:.0f} min left",
                highlight=False,
            )

    @contextlib.contextmanager
    def training(self, plan: PrivacyPlan, done: int) -> Iterator[TrainingBar]:
        """See `Display`."""
        self.advance(done, skipped=True)
        yield TrainingBar(plan, done, on_step=lambda: self.advance(1))
