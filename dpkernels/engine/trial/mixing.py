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
from dataclasses import replace
from typing import Any

import torch

from dpkernels.engine.capture.layer import leaves_of
from dpkernels.engine.capture.refusals import NotPerSample
from dpkernels.engine.capture.session import Session
from dpkernels.engine.capture.trial_book import BATCHED, SCALAR
from dpkernels.engine.trial.batch_rows import BatchRows
from dpkernels.engine.trial.findings import Comparison, Finding, Kind, kept_moved
from dpkernels.engine.trial.fingerprints import Fingerprints
from dpkernels.engine.trial.index_watch import IndexWatch
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
from dpkernels.engine.trial.state import is_buffer


def refuse_mixing(
    session: Session,
    run: Callable[[Any], list[torch.Tensor]],
    batch: Any,
    rows: int,
    together: Callable[[bool], bool] | None = None,
) -> bool:
    """Poison samples of a batch; refuse a model if another sample moves.

    Args:
        session: the model's session; its :class:`TrialBook` keeps what trials learn.
        run: forward pass on a batch; returns the tensors to differentiate (batched or scalar).
        batch: nested arguments of `run`.
        rows: rows of the batch.
        together: where processes gather parameters in every pass: whether any of them says yes.
            The processes then make equally many passes.

    Returns:
        Whether the batch could tell: not where a sample that is not finite spread to another.

    Raises:
        NotPerSample: samples mix; the message names the layer, the kind of fault and a remedy.
    """
    at = BatchRows(rows, session.views, session.axis)
    if together is None and not at.can_tell(batch):
        return False
    with nothing_stays(session.root):
        trial = _Trial(session, Passes(session, run, batch, at), together)
        told = trial.run()
    for warning in trial.warnings:
        warnings.warn(warning, stacklevel=2)
    return told


#: what was poisoned in a pass, and what was seen
Watched = tuple[Poison | None, Fingerprints]


class _Trial:
    """One trial of one batch."""

    def __init__(
        self, session: Session, passes: Passes, together: Callable[[bool], bool] | None
    ) -> None:
        self.book, self.session, self.passes = session.trials, session, passes
        self.at, self.batch = passes.at, passes.batch
        self.warnings: list[str] = []
        self._together = together
        #: whether the trial is a first one: a pass over the batch as it is, both sides poisoned
        self._whole = min(self.at.samples, 3) > max(self.book.largest, 1)
        #: by what is differentiated, the poison of the pass that others are compared with, and what
        #: the pass saw
        self._base: dict[str, Watched] = {}
        self._finding: Finding | None = None
        #: by name of an attribute that keeps data, the poison that changed what is kept
        self._kept: dict[str, Poison] = {}

    def run(self) -> bool:
        """Whether the batch could tell.

        Raises:
            NotPerSample: samples mix.
        """
        broken = self.at.not_finite(self.batch)
        self._whole = self._any(self._whole or bool(broken.any()))
        kinds = self._kinds()
        if self._any(self._hides(broken)):
            return False
        for outputs, poison in self._plan(kinds):
            self._judge(outputs, poison)
        if self._any(bool(self._kept)):
            self._conclude(self._read_later())
        self._conclude(None, last=True)
        return True

    def _hides(self, broken: torch.Tensor) -> bool:
        """Whether a sample that is not finite has spread to others, and hides what else mixes."""
        if not bool(broken.any()):
            return False
        finite = self._base[BATCHED][1].moments.isfinite().all(2).all(0)
        return int((~broken).sum()) < 2 or not bool((finite | broken).all())

    def _kinds(self) -> tuple[str, ...]:
        """The kinds of poison that fit the batch, besides NAN; a first trial's first pass."""
        labels = label_places(self.batch, self.at)
        watch = IndexWatch([leaves_of(self.batch)[place] for place in labels])
        if self._whole:
            # on a GPU, an index made from NaN would end the process
            with watch if self.session.anchor.is_cuda else contextlib.nullcontext():
                self._base[BATCHED] = None, self.passes.watch(None)
        if self._any(watch.from_floats):
            self.book.unable |= {NAN, LARGE}
        if self._any(watch.from_labels):
            self.book.unable.add(IGNORED)
        fitting = [EXCHANGED, BLANK]
        fitting += [LARGE] if has_floats(self.batch, self.at) else []
        fitting += [IGNORED] if labels else []
        return tuple(kind for kind in fitting if kind not in self.book.unable)

    def _outputs(self) -> list[str]:
        """The outputs to differentiate, each in passes of its own: losses drown beside logits."""
        if self.passes.returned != {BATCHED, SCALAR}:
            return [BATCHED]
        used = [kind for kind in (BATCHED, SCALAR) if kind in self.book.differentiated]
        return used or [BATCHED, SCALAR]

    def _compared_with(self, outputs: str, side: torch.Tensor) -> Fingerprints:
        """What the pass saw that others over the same side are compared with.

        In a first trial it is a pass over the batch as it is; later, to spare a pass, one with NaN
        in the same side.
        """
        if outputs not in self._base:
            nan = None if self._whole else Poison(side, (NAN,))
            found = None if nan is None else self._try(outputs, nan)
            if found is None:
                nan, found = None, self.passes.watch(None, outputs)
            self._base[outputs] = nan, found
        return self._base[outputs][1]

    def _plan(self, kinds: tuple[str, ...]) -> Iterator[tuple[str, Poison]]:
        """Which outputs are differentiated and what is poisoned, pass by pass.

        A first trial poisons both sides of a split, by NaN and by the other kinds, and deals out
        every kind; a later one poisons one side, by the other kinds.
        """
        turn = self.book.turn
        bits = max(1, (self.at.samples - 1).bit_length())
        ones = (torch.arange(self.at.samples) >> (turn % bits)) % 2 == 1
        side, other = (ones, ~ones) if (turn // bits) % 2 == 0 else (~ones, ones)
        outputs = self._outputs()
        if not self._whole:
            yield from ((each, Poison(side, kinds, turn)) for each in outputs)
            return
        for samples in (side, other):
            yield outputs[-1], Poison(samples, (NAN,))
        for place, each in enumerate(outputs):
            dealt, last = 0, place == len(outputs) - 1
            for number, samples in enumerate([other, side] * len(kinds)):
                yield each, Poison(samples, kinds, turn + dealt)
                dealt += int(samples.sum())
                if number > 0 and (dealt >= len(kinds) or not last):
                    break

    def _judge(self, outputs: str, poison: Poison) -> None:
        """One pass over a poisoned batch, compared with another pass."""
        found = self._try(outputs, poison)
        finding = None if found is None else self._compare(outputs, poison, found)
        of_lengths = finding is not None and finding.of_shapes and self._has_lengths()
        if self._any(of_lengths and not poison.keep_lengths):
            poison = replace(poison, keep_lengths=True)
            found = self._try(outputs, poison)
            finding = None if found is None else self._compare(outputs, poison, found)
        self._conclude(finding)

    def _conclude(self, finding: Finding | None, last: bool = False) -> None:
        """Raise where samples mix; where processes go together, in all of them at the end."""
        self._finding = self._finding or finding
        if self._together is None:
            if self._finding is not None:
                raise NotPerSample(str(self._finding))
        elif last and self._together(self._finding is not None):
            raise NotPerSample(str(self._finding or "another process has found that samples mix"))

    def _any(self, here: bool) -> bool:
        return here if self._together is None else self._together(here)

    def _try(self, outputs: str, poison: Poison) -> Fingerprints | None:
        """A pass over a poisoned batch; None where the model raises an exception for any poison.

        A model may refuse values, indices, or lengths out of order: no finding. The kinds of poison
        that a model has refused are left out from then on.
        """
        kinds = [kind for kind in poison.kinds if kind not in self.book.unable]
        while kinds or EXCHANGED in poison.kinds:
            now = replace(poison, kinds=tuple(kinds) or (EXCHANGED,))
            now = now if kinds else replace(now, keep_lengths=True)
            found = None
            try:
                found = self.passes.watch(now, outputs)
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except NotPerSample:
                if now.kinds == (EXCHANGED,) and self._together is None:
                    raise
            except Exception:
                found = None
            if not self._any(found is None):
                return found
            if not kinds:
                break
            refused = kinds.pop()
            self.book.unable |= {refused} - {EXCHANGED}
        return None

    def _has_lengths(self) -> bool:
        """Whether the batch has an integer for each sample, which may be a length."""
        return any(
            self.at.holds(leaf) and leaf.numel() == self.at.rows and not leaf.is_floating_point()
            for leaf in leaves_of(self.batch)
        )

    def _compare(self, outputs: str, poison: Poison, found: Fingerprints) -> Finding | None:
        before, base = self._compared_with(outputs, poison.samples)
        compared = Comparison(base, found, ~poison.samples)
        if compared.parting is not None and before is not None:
            base = self._look_without_nan(outputs)
            compared = Comparison(base, found, ~poison.samples)
        nan = NAN in poison.kinds
        if compared.parting is not None:
            if nan:  # a model may look for NaN; poisons of their own show branches on magnitudes
                return None
            what = f"the model takes another path through its layers when {poison} replaced"
            return Finding(f"layer {compared.parting!r}", what, Kind.BRANCH, of_shapes=True)
        if nan:
            self.book.axes.update(compared.axes())
        place = compared.first_moved()
        if place is not None:
            return self._explained(outputs, poison, compared, place)
        for name in kept_moved(base.left, found.left):
            if is_buffer(self.session.root, name):
                return Finding.of_buffer(name, poison)
            if name not in self.book.harmless:
                self._kept.setdefault(name, poison.of(EXCHANGED))
        if compared.same_shapes and not nan and bool(compared.bits_moved.any()):
            return self._small(outputs, poison)
        return None

    def _compared_with(self, outputs: str, side: torch.Tensor) -> Watched:
        """The pass that passes with poison in one side are compared with.

        In a first trial it is a pass over the batch as it is; later, to spare a pass, one with NaN
        in the same side.
        """
        if outputs not in self._base:
            nan = Poison(side, (NAN,))
            found = None if self._whole else self._try(outputs, nan)
            if found is None:
                self._look_without_nan(outputs)
            else:
                self._base[outputs] = nan, found
        return self._base[outputs]

    def _look_without_nan(self, outputs: str) -> Fingerprints:
        """Compare from now on with a pass over the batch as it is."""
        self._base[outputs] = None, self.passes.watch(None, outputs)
        return self._base[outputs][1]

    def _explained(self, outputs: str, poison: Poison, compared: Comparison, place: int) -> Finding:
        """The finding that a tensor moved."""
        seen, sample = compared.seen[place], int(compared.moved[place].nonzero()[0])
        layer = f"layer {seen.layer!r}" if seen.layer else "model"
        if self._together is None and self._repeated(outputs).differs():
            what = f"{seen.kind} differ between two passes that ought to be equal"
            return Finding(layer, what, Kind.UNREPEATABLE)
        what = f"the {seen.kind} of sample {sample} move when {poison} replaced"
        kind = Kind.of(seen, compared.same_input(seen.layer))
        if kind is Kind.STATISTICS and self._together is None and seen.layer:
            axis = self._axis(outputs, poison, place)
            if axis:
                self.book.axes[seen.layer, seen.kind] = axis
                kind = Kind.ROWS
        return Finding(layer, what, kind, of_shapes=not compared.same_shapes)

    def _axis(self, outputs: str, poison: Poison, place: int) -> int | None:
        """The axis on which the values of poisoned samples stand in a tensor, and nothing else."""
        try:
            before, after = (
                self.passes.watch(each, outputs, keep=place).kept for each in (None, poison)
            )
        except Exception:
            return None
        if before is None or after is None or before.shape != after.shape:
            return None
        changed = (before != after) & ~(before.isnan() & after.isnan())
        for axis, size in enumerate(changed.shape):
            if size % self.at.samples == 0:
                other = [n for n in range(changed.ndim) if n != axis]
                expected = poison.samples.repeat_interleave(size // self.at.samples)
                if torch.equal(changed.any(other) if other else changed, expected):
                    return axis
        return None

    def _repeated(self, outputs: str) -> Comparison:
        """A pass, compared with the same pass once more."""
        poison, found = self._base[outputs]
        watched = torch.ones(self.at.samples, dtype=torch.bool)
        return Comparison(found, self.passes.watch(poison, outputs), watched)

    def _small(self, outputs: str, poison: Poison) -> Finding | None:
        """Whether a change as small as rounding is one that grows with the poison.

        Products of another number of rows round differently, so equal shapes are asked for; kernels
        that are not deterministic round differently in every pass.
        """
        if "rounding" in self.book.said or self._together is not None:
            return None
        again = self._repeated(outputs)
        if again.parting is not None or bool(again.bits_moved.any()):
            self.book.said.add("rounding")
            self.warnings.append(
                "two equal passes of the model do not have equal bits, so the trial for mixed "
                "samples takes what moves by no more than rounding for rounding (deterministic "
                "kernels, as by torch.use_deterministic_algorithms(True), would be judged bit by "
                "bit)"
            )
            return None
        moves = []
        for factor in (1.0, 1000.0):
            found = self._try(outputs, replace(poison.of(LARGE), factor=factor))
            if found is None:
                return None
            compared = Comparison(self._base[outputs][1], found, ~poison.samples)
            if compared.parting is not None:
                return None
            moves.append(compared)
        grown = moves[1].grown_from(moves[0])
        return None if grown is None else self._explained(outputs, poison, moves[1], grown)

    def _read_later(self) -> Finding | None:
        """Whether a pass reads what another left in attributes, so that a record moves later steps.

        What is kept and never read (attention maps for a picture) is left alone.
        """
        outputs = self._outputs()[0]
        everyone = torch.ones(self.at.samples, dtype=torch.bool)
        poison = next(iter(self._kept.values()), None)
        if poison is None:  # another process has found something
            poison = Poison(torch.arange(self.at.samples) % 2 == 1, (EXCHANGED,))
        try:
            clean = self.passes.watch(None, outputs, after=poison.nobody())
            other = self.passes.watch(None, outputs, after=poison)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception:
            return None
        compared = Comparison(clean, other, everyone)
        names = ", ".join(repr(name) for name in sorted(self._kept))
        if compared.differs() or bool(compared.bits_moved.any()):
            what = f"what a forward pass leaves there moves the next pass when {poison} replaced"
            return Finding(f"attribute {names}", what, Kind.STATE)
        self.book.harmless |= self._kept.keys()
        return None
