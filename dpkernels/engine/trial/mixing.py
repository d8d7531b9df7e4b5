"""Do samples mix? Some samples of a batch are poisoned; no value of another sample may move.

A trial finds faults that no list of layer types can: a transposed batch axis, positions embedded
once for the whole batch, statistics over the batch, a loss that the whole batch's tokens divide, a
state that one step leaves to the next. For a bit of the samples' index, the samples whose bit is 1
are poisoned and the others watched, then the other way round. The bits of an index separate every
pair of samples: the first trial takes one bit both ways, every later one another bit.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dpkernels.engine.capture.layer import leaves_of
from dpkernels.engine.capture.refusals import NotPerSample
from dpkernels.engine.capture.session import Session
from dpkernels.engine.capture.trial_book import BATCHED, SCALAR, TrialBook
from dpkernels.engine.trial.batch_rows import BatchRows
from dpkernels.engine.trial.findings import Finding
from dpkernels.engine.trial.index_watch import IndexWatch
from dpkernels.engine.trial.judge import Judge
from dpkernels.engine.trial.passes import Passes, nothing_stays
from dpkernels.engine.trial.poisons import (
    BLANK,
    EXCHANGED,
    IGNORED,
    LARGE,
    NAN,
    Poison,
    has_floats,
    label_places,
)


def refuse_mixing(
    session: Session,
    run: Callable[[Any], list[torch.Tensor]],
    batch: Any,
    rows: int,
    book: TrialBook | None = None,
    together: Callable[[bool], bool] | None = None,
) -> bool:
    """Poison samples of a batch; refuse a model if another sample moves.

    Args:
        session: the model's session.
        run: forward pass on a batch; returns the tensors to differentiate (batched or scalar).
        batch: nested arguments of `run`.
        rows: rows of the batch.
        book: keeps what trials learn; None: the session's.
        together: where processes gather parameters in every pass: whether any of them says yes.
            The processes then make equally many passes.

    Returns:
        Whether the batch could tell: not where a sample that is not finite spread to another.

    Raises:
        NotPerSample: samples mix; the message names the layer, the kind of fault and a remedy.
    """
    book = book or session.trials
    at = BatchRows.of(batch, rows, session.views, session.axis, book.shared)
    if together is None and not at.can_tell(batch):
        return False
    with nothing_stays(session.root):
        trial = _Trial(book, Passes(session, run, batch, at, book, together))
        told = trial.run()
    for warning in trial.judge.warnings:
        warnings.warn(warning, stacklevel=2)
    return told


def indices_abort(session: Session) -> bool:
    """Whether an index out of range, as one made from NaN, ends the process: on a GPU."""
    return session.anchor.is_cuda


class _Trial:
    """One trial of one batch."""

    def __init__(self, book: TrialBook, passes: Passes) -> None:
        self.book, self.passes = book, passes
        self.at, self.batch = passes.at, passes.batch
        broken = self.at.not_finite(self.batch)
        self._broken = broken if bool(broken.any()) else None
        first = min(self.at.samples, 3) > max(book.largest, 1)
        #: whether a pass over the batch as it is is made, and both sides are poisoned
        self._whole = passes.any_says(first or self._broken is not None)
        self.judge = Judge(book, passes, nan_for_clean=not self._whole)
        self._finding: Finding | None = None

    def run(self) -> bool:
        """Whether the batch could tell.

        Raises:
            NotPerSample: samples mix.
        """
        kinds = self._kinds()
        if self.passes.any_says(self._hidden()):
            return False
        for outputs, poison in self._plan(kinds):
            if outputs in self.book.doubts:
                continue
            try:
                self._try(outputs, poison)
            except NotPerSample as error:
                if not self._unused(outputs):
                    raise
                self.book.doubts[outputs] = str(error)
                self._try(BATCHED, poison)
        self._conclude(self.judge.read_later(self._outputs()[0]))
        self._conclude(None, last=True)
        self.judge.look_at_the_loop()
        return True

    def _hidden(self) -> bool:
        """Whether a sample that is not finite has spread to others, and hides what else mixes."""
        broken = self._broken
        if broken is None:
            return False
        finite = self.judge.clean(BATCHED).moments.isfinite().all(2).all(0)
        apart = finite | ~broken  # an attention mask of 0 and -inf breaks nobody
        return int(apart.sum()) < 2 or not bool((finite | broken).all())

    def _kinds(self) -> tuple[str, ...]:
        """The kinds of poison that fit the batch, besides NAN; a first trial's first pass."""
        labels = label_places(self.batch, self.at)
        if self._whole:
            watch = IndexWatch([leaves_of(self.batch)[place] for place in labels])
            aborts = indices_abort(self.passes.session)
            with watch if aborts else contextlib.nullcontext():
                written = self.passes.find_written_parameters(lambda: self.judge.clean(BATCHED))
            if written:
                self.judge.forget()
            if self.passes.any_says(watch.from_floats):
                self.book.unable |= {NAN, LARGE}
            if self.passes.any_says(watch.from_labels):
                self.book.unable.add(IGNORED)
        kinds = [EXCHANGED, BLANK]
        kinds += [LARGE] if has_floats(self.batch, self.at) else []
        kinds += [IGNORED] if labels else []
        return tuple(kind for kind in kinds if kind not in self.book.unable)

    def _outputs(self) -> list[str]:
        """The outputs to differentiate, each in passes of its own: losses drown beside logits."""
        kinds = self.book.differentiated or self.passes.returned or {BATCHED}
        return [kind for kind in (BATCHED, SCALAR) if kind in kinds]

    def _unused(self, outputs: str) -> bool:
        """Whether these may be losses that training leaves aside, and takes its own of outputs."""
        known = self.book.differentiated or self.passes.together is not None
        return not known and outputs == SCALAR and BATCHED in self.passes.returned

    def _plan(self, kinds: tuple[str, ...]) -> Iterator[tuple[str, Poison]]:
        """Which outputs are differentiated and what is poisoned, pass by pass.

        A first trial poisons both sides of a split, by NaN and by the other kinds, and deals out
        every kind; a later one poisons one side. Every third trial poisons all samples but one:
        other samples may agree on what one alone decides (``(x > 1).any()``).
        """
        turn, samples = self.book.turn, self.at.samples
        outputs = self._outputs()
        if not self._whole and turn % 3 == 2:
            one = torch.arange(samples) == turn % samples
            yield from ((each, Poison(~one, kinds, turn)) for each in outputs)
            return
        halves, bits = turn - turn // 3, max(1, (samples - 1).bit_length())
        ones = (torch.arange(samples) >> (halves % bits)) % 2 == 1
        side, other = (ones, ~ones) if (halves // bits) % 2 == 0 else (~ones, ones)
        if not self._whole:
            yield from ((each, Poison(side, kinds, turn)) for each in outputs)
            return
        for poisoned in (side, other):
            yield outputs[-1], Poison(poisoned, (NAN,))
        for place, each in enumerate(outputs):
            dealt, last = 0, place == len(outputs) - 1
            for number, poisoned in enumerate([other, side] * len(kinds)):
                yield each, Poison(poisoned, kinds, turn + dealt)
                dealt += int(poisoned.sum())
                if not self.passes.any_says(number == 0 or (last and dealt < len(kinds))):
                    break

    def _try(self, outputs: str, poison: Poison) -> None:
        """One pass over a poisoned batch, judged.

        Where shapes moved, as with lengths, two passes more: one in which lengths stay, and one
        without random numbers, which shows whether outputs follow lengths.
        """
        finding = self._found(outputs, poison)
        of_lengths = finding is not None and finding.of_shapes and self._has_lengths()
        if self.passes.any_says(of_lengths):
            follows = self.judge.follows_lengths(outputs, poison)
            finding = follows or self._found(outputs, poison.with_lengths())
        self._conclude(finding)

    def _found(self, outputs: str, poison: Poison) -> Finding | None:
        found = self.passes.attempt(poison, outputs)
        return None if found is None else self.judge.compare(outputs, poison, found)

    def _has_lengths(self) -> bool:
        """Whether the batch has integers or truths, which lengths may be told by."""
        whole = (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64)
        return any(self.at.holds(leaf) and leaf.dtype in whole for leaf in leaves_of(self.batch))

    def _conclude(self, finding: Finding | None, last: bool = False) -> None:
        """Raise where samples mix; where processes go together, in all of them at the end."""
        if self.passes.together is None:
            if finding is not None:
                raise NotPerSample(str(finding))
            return
        self._finding = self._finding or finding
        if last and self.passes.any_says(self._finding is not None):
            raise NotPerSample(str(self._finding or "another process has found that samples mix"))
