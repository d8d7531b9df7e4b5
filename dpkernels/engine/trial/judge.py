"""What the passes of a trial differ in: whether that is a finding, and what explains it."""

from __future__ import annotations

from dataclasses import replace

import torch

from dpkernels.engine.capture.sample_by_sample import deterministic
from dpkernels.engine.capture.trial_book import TrialBook
from dpkernels.engine.trial.findings import Comparison, Finding, Kind, kept_moved
from dpkernels.engine.trial.fingerprints import Fingerprints
from dpkernels.engine.trial.passes import Passes
from dpkernels.engine.trial.poisons import EXCHANGED, LARGE, NAN, Poison
from dpkernels.engine.trial.state import published_as, written


class Judge:
    """Compares the passes of one trial.

    Args:
        book: what earlier trials have learned, and this one learns.
        passes: the trial's passes.
        nan_for_clean: compare with a pass that has NaN in the poisoned samples, which spares a
            pass over the batch as it is.

    Attributes:
        warnings: what the trial has to say besides a finding.
    """

    def __init__(self, book: TrialBook, passes: Passes, nan_for_clean: bool) -> None:
        self.book, self.passes = book, passes
        self.warnings: list[str] = []
        self._nan_for_clean = nan_for_clean
        #: by what is differentiated, the pass that others are compared with, and its poison
        self._base: dict[str, tuple[Poison | None, Fingerprints]] = {}
        #: by name of an attribute that keeps data, the poison that changed what is kept
        self._kept: dict[str, Poison] = {}

    def clean(self, outputs: str) -> Fingerprints:
        """A pass over the batch as it is, with which others are compared from now on."""
        if self._base.get(outputs, (True,))[0] is not None:
            self._base[outputs] = None, self.passes.watch(None, outputs)
        return self._base[outputs][1]

    def forget(self) -> None:
        """Forget the passes so far: what they left is not put back."""
        self._base.clear()

    def _compared_with(self, outputs: str, side: torch.Tensor) -> Fingerprints:
        """The pass with which passes over a batch that is poisoned in one side are compared."""
        if outputs not in self._base:
            nan = Poison(side, (NAN,))
            found = self.passes.attempt(nan, outputs) if self._nan_for_clean else None
            if found is None:
                return self.clean(outputs)
            self._base[outputs] = nan, found
        return self._base[outputs][1]

    def compare(self, outputs: str, poison: Poison, found: Fingerprints) -> Finding | None:
        """What a pass over a poisoned batch shows."""
        base = self._compared_with(outputs, poison.samples)
        compared = Comparison(base, found, ~poison.samples)
        if self.passes.any_says(compared.parting is not None and self._nan_for_clean):
            base = self.clean(outputs)
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
            published = published_as(self.passes.session.root, name)
            if published is not None:
                return Finding.of_published(f"{published} {name!r}", poison)
            if name not in self.book.harmless:
                self._kept.setdefault(name, poison.of(EXCHANGED))
        if compared.same_shapes and not nan and bool(compared.bits_moved.any()):
            return self._small(outputs, poison)
        return None

    def _explained(self, outputs: str, poison: Poison, compared: Comparison, place: int) -> Finding:
        """The finding that a tensor moved."""
        output = compared.output_beside_lengths()
        place = place if output is None else output
        seen = compared.seen[place]
        if self.passes.together is None and self._repeated(outputs).differs():
            what = f"the {seen.kind} differ between two passes that ought to be equal"
            return Finding(seen.where, what, Kind.UNREPEATABLE)
        kept = self._read_now(outputs, poison)
        if kept is not None:
            return kept
        same_input = compared.same_input(seen.layer)
        if seen.backward and self.passes.together is None:
            forward = self._the_other_way(outputs, poison)
            if forward is not None:
                return forward
            if same_input and NAN in poison.kinds:  # no integer is NaN
                others = self.passes.attempt(poison.of(EXCHANGED), outputs)
                same_input = others is None or Comparison(
                    self.clean(outputs), others, ~poison.samples
                ).same_input(seen.layer)
        kind = Kind.of(seen, same_input)
        if kind is Kind.BACKWARD and self.passes.unwatched:
            kind = Kind.OUTPUT
        if kind is Kind.STATISTICS and self.passes.together is None and seen.layer:
            axis = self._axis(outputs, poison, place)
            if axis:
                self.book.axes[seen.layer, seen.kind] = axis
                kind = Kind.ROWS
        of_shapes = output is None and not compared.same_shapes
        return Finding(seen.where, compared.said_of(place, poison), kind, of_shapes)

    def follows_lengths(self, outputs: str, poison: Poison) -> Finding | None:
        """The finding that outputs follow the longest sample, by passes that draw nothing."""
        with deterministic(self.passes.session.root):
            clean = self.passes.watch(None, outputs)
            found = self.passes.attempt(poison, outputs)
        if found is None:
            return None
        compared = Comparison(clean, found, ~poison.samples)
        place = compared.output_beside_lengths()
        if place is None:
            return None
        return Finding("model", compared.said_of(place, poison), Kind.STATISTICS)

    def _the_other_way(self, outputs: str, poison: Poison) -> Finding | None:
        """The finding that watched samples enter poisoned ones in the forward pass.

        Where the forward pass takes sample i to sample j, the backward pass takes j's slopes to i,
        and may be the first to show.
        """
        other = replace(poison, samples=~poison.samples)
        for kind in (NAN, EXCHANGED):
            found = self.passes.attempt(other.of(kind), outputs)
            if found is None:
                continue
            compared = Comparison(self.clean(outputs), found, poison.samples)
            place = compared.first_moved()
            if place is not None and not compared.seen[place].backward:
                return self._explained(outputs, other.of(kind), compared, place)
        return None

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
            if size % self.passes.at.samples == 0:
                other = [n for n in range(changed.ndim) if n != axis]
                expected = poison.samples.repeat_interleave(size // self.passes.at.samples)
                if torch.equal(changed.any(other) if other else changed, expected):
                    return axis
        return None

    def _repeated(self, outputs: str) -> Comparison:
        """A pass, compared with the same pass once more."""
        poison, found = self._base[outputs]
        watched = torch.ones(self.passes.at.samples, dtype=torch.bool)
        return Comparison(found, self.passes.watch(poison, outputs), watched)

    def _small(self, outputs: str, poison: Poison) -> Finding | None:
        """Whether a change as small as rounding is one that grows with the poison.

        Products of another number of rows round differently, so equal shapes are asked for; kernels
        that are not deterministic round differently in every pass.
        """
        if "rounding" in self.book.said or self.passes.together is not None:
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
            found = self.passes.attempt(replace(poison.of(LARGE), factor=factor), outputs)
            if found is None:
                return None
            compared = Comparison(self._base[outputs][1], found, ~poison.samples)
            if compared.parting is not None:
                return None
            moves.append(compared)
        grown = moves[1].grown_from(moves[0])
        return None if grown is None else self._explained(outputs, poison, moves[1], grown)

    def read_later(self, outputs: str) -> Finding | None:
        """Whether a pass reads what another left in attributes, so that a record moves later steps.

        What is kept and not read (attention maps for a picture) is left alone. A model may begin to
        read at a later step: what can be NaN is NaN in later trials, other things are tried again.
        """
        if not self.passes.any_says(bool(self._kept)):
            return None
        everyone = torch.ones(self.passes.at.samples, dtype=torch.bool)
        poison = next(iter(self._kept.values()), None)
        if poison is None:  # another process has found something
            poison = Poison(torch.arange(self.passes.at.samples) % 2 == 1, (EXCHANGED,))
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
        if NAN not in self.book.unable:
            self.book.harmless |= self.passes.state.floats(self._kept)
        return None

    def _read_now(self, outputs: str, poison: Poison) -> Finding | None:
        """Whether a pass reads now what no pass has read so far."""
        if not self.book.harmless or self.passes.together is not None:
            return None
        self._kept = dict.fromkeys(self.book.harmless, poison.of(EXCHANGED))
        return self.read_later(outputs)

    def look_at_the_loop(self) -> None:
        """Warn of what was written since the last trial, and that no forward pass writes."""
        before, self.book.marks = self.book.marks, self.passes.state.marks()
        for _, found in self._base.values():
            self.book.of_passes |= found.left.keys()
        names = written(before, self.book.marks) - self.book.of_passes - self.book.said
        self.book.said |= names
        if names:
            self.warnings.append(
                f"{', '.join(map(repr, sorted(names)))}: written between two training steps, not "
                "by the forward pass, so nothing clips or adds noise to what is kept there. A "
                "queue of features or prototypes lets a record move later steps, and epsilon does "
                "not hold; a schedule (a temperature) or an average of released weights is fine"
            )
