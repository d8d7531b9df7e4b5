"""Runs that are interrupted, and what a run's checkpoint holds."""

import contextlib
from pathlib import Path

import torch

from dpkernels.training.progress import Display
from dpkernels.training.run_folder import load_checkpoint


class StopAfter(Display):
    """Interrupts training after a number of steps, as Ctrl-C would."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    @contextlib.contextmanager
    def training(self, plan, done):
        with super().training(plan, done) as bar:
            yield _StoppingBar(bar, self._steps)


class _StoppingBar:
    def __init__(self, bar, steps: int) -> None:
        self._bar, self._left = bar, steps

    def advance(self, statistics):
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        return self._bar.advance(statistics)


def weights(run: Path) -> torch.Tensor:
    state = load_checkpoint(run / "checkpoints" / "last.pt")["model"]
    return torch.cat([value.flatten() for value in state.values()])


def history(run: Path) -> list:
    update = load_checkpoint(run / "checkpoints" / "last.pt")["update"]
    return [list(entry) for entry in update["accountant"]["history"]]
