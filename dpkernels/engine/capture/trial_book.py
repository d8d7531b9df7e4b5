"""When a model is tried for mixed samples, what has passed, and what the trials have learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dpkernels.engine.capture.refusals import NotPerSample, Untried

#: when trials run, see :class:`TrialBook`
SCHEDULES = ("doubling", "first", "every", "off")
#: what is differentiated: outputs with a row for each sample, or the model's losses
BATCHED, SCALAR = "batched", "scalar"


def output_kind(output: torch.Tensor, axis: int) -> str:
    """BATCHED or SCALAR: whether an output of the model has the sample axis `axis`.

    A vector of one value is a loss too.
    """
    return SCALAR if output.ndim <= axis or output.shape == (1,) else BATCHED


class TrialBook:
    """The trial that the model's forward runs, and what has passed it.

    Schedules: ``"doubling"`` tries the first batch that can tell, and then the 2nd, 4th, 8th, ...
    batch; ``"first"`` the first batch only; ``"every"`` every batch; ``"off"`` none. Whatever the
    schedule (but "off"), a batch is tried in which a layer meets rows that it met in no trial.

    Args:
        schedule: one of the above.

    Attributes:
        trial: called with session, forward pass, the pass' batch and the batch's rows; raises
            :class:`NotPerSample` where samples mix, returns whether the batch could tell. None:
            the model's forward runs no trial.
        passed: layers, their rows per sample and numbers of axes that a trial has passed; None
            before the first.
        turn: number of trials that could tell.
        axes: by layer and kind of tensor, the axis (samples' first) on which the NaN of a poisoned
            sample stood; None where it stood nowhere, so that the tensor belongs to everybody.
        unable: kinds of poison that made the model raise an exception.
        shared: arguments of the model that are the same for all samples, by their place.
        harmless: names of attributes that keep floats which no pass has read; they are NaN in
            passes with NaN, so that a pass which reads them shows it.
        of_passes: names of attributes that a forward pass of a trial has written.
        written: names of parameters that the model's own forward pass writes.
        said: warnings given.
        marks: by name, buffers and tensors in attributes as they were at the last trial.
        largest: samples of the largest batch that has passed a trial.
        differentiated: outputs of which kind, BATCHED or SCALAR, training differentiates.
        doubts: by kind of outputs, why training may not differentiate them.
    """

    def __init__(self, schedule: str = "doubling") -> None:
        self.schedule = schedule
        self.trial: Callable[..., bool] | None = None
        self.passed: set[tuple[str, int, int]] | None = None
        self.turn = 0
        self.axes: dict[tuple[str, str], int | None] = {}
        self.unable: set[str] = set()
        self.shared: set[str] = set()
        self.harmless: set[str] = set()
        self.of_passes: set[str] = set()
        self.written: set[str] = set()
        self.said: set[str] = set()
        self.marks: dict[str, Any] = {}
        self.differentiated: set[str] = set()
        self.doubts: dict[str, str] = {}
        self.largest = 0
        #: batches of two samples or more
        self._batches = 0
        #: whether a batch at which a trial is due could not tell
        self._owed = False
        self._under_way = False

    def due(self, samples: int) -> bool:
        """Whether a batch of so many samples, which begins, calls for a trial.

        Whatever the schedule, a trial is due for the first batch of two or more samples, and again
        for the first of three or more: in a batch of two, exchanging one sample for the other makes
        both equal, which hides some mixing.
        """
        if samples < 2 or self.schedule == "off":
            return False
        self._batches += 1
        doubled = self._batches & (self._batches - 1) == 0
        self._owed |= self.schedule == "every" or (self.schedule == "doubling" and doubled)
        return self._owed or min(samples, 3) > max(self.largest, 1)

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
            self.turn += 1
            self._owed = False
            self.largest = max(self.largest, samples)

    def differentiates(self, outputs: str) -> None:
        """Training differentiates outputs of this kind, BATCHED or SCALAR.

        Raises:
            NotPerSample: a trial has found that these couple samples.
        """
        self.differentiated.add(outputs)
        if outputs in self.doubts:
            raise NotPerSample(self.doubts[outputs])

    def check(self, layer: str, count: int, axes: int) -> None:
        """Raise :class:`Untried` where no trial has seen a layer on such an input.

        During a trial the layer, its rows per sample and the input's number of axes are noted. One
        row per sample needs no trial of its own in a layer that no trial has met.
        """
        if self.passed is None or (layer, count, axes) in self.passed:
            return
        if self._under_way:
            self.passed.add((layer, count, axes))
        elif count > 1 or any(other == layer for other, _, _ in self.passed):
            raise Untried(
                f"layer {layer!r}: it has {count} rows for each sample, in an input of {axes} "
                "axes, which it had in no trial, so which rows are whose is unknown; let it "
                "see the same rows whenever it is called, and use checkpoint(use_reentrant=False)"
            )
