"""One pass of a trial: forward and backward over a batch, watched, and nothing of it stays."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dpkernels.engine.capture.refusals import NotPerSample
from dpkernels.engine.capture.session import Session
from dpkernels.engine.capture.trial_book import BATCHED, SCALAR, TrialBook, output_kind
from dpkernels.engine.trial import random_numbers
from dpkernels.engine.trial.batch_rows import BatchRows
from dpkernels.engine.trial.fingerprints import Fingerprints
from dpkernels.engine.trial.poisons import EXCHANGED, NAN, Poison, Twins
from dpkernels.engine.trial.state import KeptState, parameter_fingerprints

#: pieces in which slopes are made, so that no second tensor of an output's size is
_PIECES = 16


class Passes:
    """Passes over one batch, which all draw the same random numbers, of torch, numpy and Python.

    A pass is forward and backward over the whole batch, without weight gradients. A few samples of
    the batch would not do: statistics over groups of ``batch / groups`` samples mix nobody in a
    batch of ``groups``, and everybody in a larger one.

    Args:
        session: the model's session.
        run: forward pass on a batch; returns the tensors to differentiate (batched or scalar).
        batch: nested arguments of `run`.
        at: where the batch has its samples.
        book: what earlier trials have learned.
        together: where processes gather parameters in every pass: whether any of them says yes.
            The processes then make equally many passes.

    Attributes:
        state: what the model kept before the first pass.
        returned: kinds of outputs that the model has returned in the passes so far.
        unwatched: whether an output is no loss, and has no row for each sample.
    """

    def __init__(
        self,
        session: Session,
        run: Callable[[Any], list[torch.Tensor]],
        batch: Any,
        at: BatchRows,
        book: TrialBook,
        together: Callable[[bool], bool] | None = None,
    ):
        self.session, self.batch, self.at = session, batch, at
        self.book, self.together = book, together
        self.state = KeptState(session.root, book.written if together is None else None)
        self.returned: set[str] = set()
        self.unwatched = False
        #: number of tensors that passed by in the last pass, at first a guess
        self._seen = 16
        self._run, self._twins = run, Twins(batch, at)
        self._seed = int(torch.randint(2**31, ()))
        self._devices = devices_of(session.root)

    def watch(
        self,
        poison: Poison | None,
        outputs: str = BATCHED,
        after: Poison | None = None,
        keep: int | None = None,
    ) -> Fingerprints:
        """Fingerprints of one pass.

        Args:
            poison: what is done to some samples; None: nothing. With NaN, attributes that have not
                been read so far are NaN too.
            outputs: which outputs are differentiated; BATCHED differentiates a model's losses where
                the model returns nothing else.
            after: runs a forward pass over the batch poisoned so before, and leaves what it left.
                None: the pass begins from the state at the beginning of the trial.
            keep: place of a tensor to keep a copy of.
        """
        session = self.session
        name_of = session.guards.names.get
        found = Fingerprints(self.at.samples, lambda p: name_of(id(p), "?"), keep, room=self._seen)
        sink = session.sink
        try:
            if after is not None:
                session.sink = Fingerprints(self.at.samples, lambda p: "?")
                self._forward(after)
            if poison is not None and NAN in poison.kinds:
                self.state.spoil(self.book.harmless)
            session.sink = found
            returned = self._forward(poison)
            found.drawn = self._drawn()
            self._watch_outputs(found, returned)
            self._backward(found, returned, poison, outputs)
            if session.anchor.is_cuda:  # a model may work on streams of its own
                torch.cuda.synchronize(session.anchor.device)
            found.left = self.state.changed()
            self._seen = len(found.seen)
        finally:
            session.sink = sink
            self.state.put_back()
        return found

    def attempt(self, poison: Poison, outputs: str) -> Fingerprints | None:
        """A pass over a poisoned batch; None where the model raises an exception for any poison.

        A model may refuse values, indices, or lengths out of order: no finding. The kinds of poison
        that a model has refused are left out from then on.
        """
        kinds = [kind for kind in poison.kinds if kind not in self.book.unable]
        while kinds or EXCHANGED in poison.kinds:
            now = poison.of(*kinds) if kinds else poison.of(EXCHANGED).with_lengths()
            found = None
            try:
                found = self.watch(now, outputs)
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except NotPerSample:
                if now.kinds == (EXCHANGED,) and self.together is None:
                    raise
            except Exception:
                found = None
            if not self.any_says(found is None):
                return found
            if not kinds:
                break
            refused = kinds.pop()
            self.book.unable |= {refused} - {EXCHANGED}
        return None

    def find_written_parameters(self, run: Callable[[], Any]) -> bool:
        """Whether a pass writes parameters that none wrote so far: they are state from now on.

        Args:
            run: makes a pass over the batch as it is.
        """
        if self.together is not None:  # parameters are in shards
            run()
            return False
        root = self.session.root
        before = parameter_fingerprints(root)
        run()
        after = parameter_fingerprints(root)
        found = {name for name in after if not torch.equal(after[name], before[name])}
        new = found - self.book.written
        if new:
            self.book.written |= new
            self.state = KeptState(root, self.book.written)
        return bool(new)

    def any_says(self, here: bool) -> bool:
        """Whether any of the processes that go together says yes."""
        return here if self.together is None else self.together(here)

    def _forward(self, poison: Poison | None) -> list[torch.Tensor]:
        random_numbers.seed_all(self._seed, self._devices)
        returned = self._run(self._twins.poisoned(poison))
        return [t for t in returned if t.layout == torch.strided and not t.is_nested]

    def _drawn(self) -> tuple[Any, ...]:
        """How far torch's generators have come."""
        on_gpu = [torch.cuda.default_generators[device].get_offset() for device in self._devices]
        return (bytes(torch.default_generator.get_state().numpy()), *on_gpu)

    def _watch_outputs(self, found: Fingerprints, outputs: list[torch.Tensor]) -> None:
        """Show what the model returned for each sample."""
        at = self.at
        for place, output in enumerate(outputs):
            if self._is_batched(output):
                rows = output.detach().movedim(at.axis, 0)
                found.saw("", f"values of output {place}", rows, at.samples)

    def _is_batched(self, output: torch.Tensor) -> bool:
        """Whether an output has the samples on their axis.

        Not so a hidden state [layers, samples, width] of as many layers as there are samples.
        """
        ambiguous = output.ndim == 3 and output.shape[0] == output.shape[1]
        return self.at.holds(output) and not ambiguous

    def _backward(
        self, found: Fingerprints, outputs: list[torch.Tensor], poison: Poison | None, wanted: str
    ) -> None:
        trained = [t for t in outputs if t.requires_grad]
        kinds = {output_kind(t, self.at.axis) for t in trained}
        self.returned |= kinds
        rows = [t for t in trained if output_kind(t, self.at.axis) == BATCHED]
        self.unwatched |= not all(map(self._is_batched, rows))
        if len(kinds) == 1:
            (wanted,) = kinds
        found.backward = wanted
        random_numbers.seed_torch(self._seed + 1, self._devices)
        chosen = [t for t in trained if output_kind(t, self.at.axis) == wanted]
        if chosen:
            with _gradients_kept(chosen):
                torch.autograd.backward(chosen, [self._slopes(t, poison) for t in chosen])

    def _slopes(self, output: torch.Tensor, poison: Poison | None) -> torch.Tensor:
        """The gradient of a stand-in loss: a sum over samples, with another slope everywhere.

        A constant slope would not do: behind a normalisation, a constant slope's gradient is zero.
        A model's own loss has slope 1. Where a sample is NaN, so are its slopes.
        """
        if output_kind(output, self.at.axis) == SCALAR:
            return torch.ones_like(output)
        slopes = torch.rand_like(output)
        for part, values in zip(slopes.chunk(_PIECES), output.detach().chunk(_PIECES)):
            part.add_(values.nan_to_num(0.0, 0.0, 0.0))
        if poison is not None and poison.kinds == (NAN,) and self._is_batched(output):
            rows = slopes.movedim(self.at.axis, 0).unflatten(0, (self.at.samples, self.at.views))
            rows[poison.samples.to(rows.device)] = torch.nan
        return slopes


@contextlib.contextmanager
def _gradients_kept(outputs: list[torch.Tensor]) -> Iterator[None]:
    """Give the leaves behind outputs their ``.grad`` back (a prompt of the user's, say)."""
    kept = [(leaf, leaf.grad) for leaf in _leaves_behind(outputs)]
    for leaf, _ in kept:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, gradient in kept:
            leaf.grad = gradient


def _leaves_behind(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The leaves that a backward pass from outputs reaches."""
    leaves = [t for t in outputs if t.grad_fn is None]
    queue: list[Any] = [t.grad_fn for t in outputs]
    seen: set[Any] = {None}
    while queue:
        node = queue.pop()
        if node not in seen:
            seen.add(node)
            queue += [below for below, _ in node.next_functions]
            if hasattr(node, "variable"):
                leaves.append(node.variable)
    return leaves


def devices_of(model: nn.Module) -> list[int]:
    """The GPUs on which a model has parameters."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})


@contextlib.contextmanager
def nothing_stays(model: nn.Module) -> Iterator[None]:
    """Restore what random number generators hold; look for no anomaly, and warn of nothing."""
    with (
        random_numbers.kept(devices_of(model)),
        torch.autograd.set_detect_anomaly(False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of numbers that are not finite
        yield
