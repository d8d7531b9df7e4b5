"""Which layers and rows of a model the trial for mixed samples has passed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpkernels.engine.capture.refusals import Untried


class TrialBook:
    """The trial that the model's forward runs, and what has passed it.

    Attributes:
        trial: called with session, forward pass, the pass' batch and the batch's rows; raises
            :class:`NotPerSample` where samples mix, returns whether the batch could tell. None:
            the model's forward runs no trial.
        passed: layers and their rows per sample that a trial has passed; None before the first.
    """

    def __init__(self) -> None:
        self.trial: Callable[..., bool] | None = None
        self.passed: set[tuple[str, int]] | None = None
        #: samples of the largest batch that has passed a trial
        self._largest = 0
        self._under_way = False

    def due(self, samples: int) -> bool:
        """Whether a batch of so many samples calls for a trial.

        A trial is due for the first batch of two or more samples, and again for the first of three
        or more: in a batch of two, replacing one sample by the other makes both equal, which hides
        some mixing.
        """
        return min(samples, 3) > max(self._largest, 1)

    @property
    def untold(self) -> bool:
        """Whether there is a trial and no batch has been able to tell yet."""
        return self.trial is not None and self.passed is None

    def run(self, samples: int, *arguments: Any) -> None:
        """Run the trial, if there is one, on a batch of so many samples.

        The layers and rows that the trial meets have passed if the batch could tell.

        Raises:
            NotPerSample: samples mix.
        """
        if self.trial is None:
            return
        before, told = self.passed, False
        self.passed, self._under_way = set(before or ()), True
        try:
            told = self.trial(*arguments)
        finally:
            self._under_way = False
            if not told:
                self.passed = before
        if told:
            self._largest = max(self._largest, samples)

    def check(self, layer: str, count: int) -> None:
        """Raise :class:`Untried` where no trial has seen a layer with `count` rows per sample.

        During a trial the layer and its rows are noted. One row per sample needs no trial of its
        own in a layer that no trial has met.
        """
        if self.passed is None or (layer, count) in self.passed:
            return
        if self._under_way:
            self.passed.add((layer, count))
        elif count > 1 or any(other == layer for other, _ in self.passed):
            raise Untried(
                f"layer {layer!r}: it has {count} rows for each sample, which it had in no trial "
                "run, so which rows are whose is unknown; let it see the same rows whenever it is "
                "called, and use checkpoint(use_reentrant=False)"
            )
