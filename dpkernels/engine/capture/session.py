"""Capture: what the captured layers of one model share, and where their contributions go.

Layers themselves are captured in :mod:`dpkernels.engine.capture.layer`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dpkernels.engine.capture.guards import Guards
from dpkernels.engine.capture.refusals import NotPerSample
from dpkernels.engine.capture.trial_book import TrialBook
from dpkernels.layers.fold import rows_per_sample
from dpkernels.layers.operands import Operand

#: what the criterion hands back to the model, as :meth:`Sink.saw` is told
CRITERION = "gradients of the criterion"


class Sink:
    """Where contributions go. This one takes none: its passes do not train the model.

    Attributes:
        trains: whether passes that end here train the model; not so in a trial or a stand-in
            pass, for which layers that have rules make no operands.
        samples: number of samples of the backward pass under way, None outside one.
    """

    trains = False

    def __init__(self) -> None:
        self.samples: int | None = None

    def reset(self) -> None:
        """Forget a backward pass, at its end or after it failed half-way."""
        self.samples = None

    def begin(self, samples: int) -> None:
        """A backward pass over `samples` samples is under way."""
        self.samples = samples

    def saw(self, layer: str, kind: str, rows: torch.Tensor, samples: int) -> None:
        """A layer's activations or backprops, sample axis first, as they pass by."""

    def add(self, parameter: nn.Parameter, operand: Operand, samples: int, layer: str) -> None:
        """One parameter's contribution from one call of one layer."""


@dataclass
class Batch:
    """What one forward pass of the model runs on, and what the pass' layers met.

    Attributes:
        rows: rows along the sample axis of the model's input, a blank sample's if `empty`.
        samples: number of samples; 1 if `empty`.
        empty: whether the batch had no sample, so a blank one runs in its place.
        marked: whether a captured layer's node is in the graph of the pass (none is where all
            layers run inside reentrant checkpoints).
        folded: a layer that had several rows per sample while no trial had been run.
    """

    rows: int
    samples: int
    empty: bool
    marked: bool = False
    folded: str | None = None


class Session:
    """What the captured layers of one model share.

    Args:
        root: the model.
        batch_first: the sample axis is 0 if True, 1 if False.
        views_per_sample: rows per sample at the model's input.
        trial: when samples are tried, see :class:`TrialBook`.

    Attributes:
        sink: where contributions go; None: layers run as they are.
        batch: the batch of the model's forward pass under way; None outside one.
        backward_batch: the batch of the forward pass behind the backward pass under way. Until a
            backward pass has reached the model's outputs, the batch of the last forward pass.
        anchor: a scalar that every captured layer takes as input, see :meth:`place_anchor`.
        trials: the trial for mixed samples, and what has passed it.
        guards: the trained parameters, guarded against ordinary gradients.
    """

    def __init__(
        self,
        root: nn.Module,
        *,
        batch_first: bool = True,
        views_per_sample: int = 1,
        trial: str = "doubling",
    ):
        self.root = root
        self.axis = 0 if batch_first else 1
        self.views = views_per_sample
        self.schedule = trial
        self._start()

    def _start(self) -> None:
        """The state of a run, which a copy or a restored pickle begins anew."""
        self.sink: Sink | None = None
        self.batch: Batch | None = None
        self.backward_batch: Batch | None = None
        self.trials = TrialBook(self.schedule)
        self.guards = Guards()
        self.place_anchor(torch.device("cpu"))
        self._depth = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copied model runs as an ordinary one: it has no optimizer to be private with."""
        return {name: self.__dict__[name] for name in ("root", "axis", "views", "schedule")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def open_sink(self) -> Sink | None:
        """The sink while layers capture; None inside :meth:`paused` or without gradients."""
        return self.sink if self._depth == 0 and torch.is_grad_enabled() else None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Run layers as they are: evaluation, or inside a unit that captures for them."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def wants_this_backward(self) -> bool:
        """Whether the backward pass under way is for the parameters.

        ``torch.autograd.grad(output, inputs)`` is for something else (saliency, an adversarial
        example) and passes by.

        Raises:
            NotPerSample: the backward pass can be differentiated again.
        """
        if torch.is_grad_enabled():
            raise NotPerSample(
                "create_graph=True: the second derivative would reach the parameters around "
                "capture, so its per-sample gradients are unknown; drop create_graph"
            )
        node = self.anchor.grad_fn
        return node is not None and torch._C._will_engine_execute_node(node)

    def receiving_sink(self, samples: int) -> Sink | None:
        """The sink, told of the backward pass under way; None if the pass is for something else."""
        if self.sink is None or not self.wants_this_backward():
            return None
        self.sink.begin(samples)
        return self.sink

    def place_anchor(self, device: torch.device) -> None:
        """Make the anchor, a scalar that every captured layer takes as input.

        The anchor requires grad, so autograd visits the node even of a first layer, whose input
        does not. The anchor is no leaf, so `_will_engine_execute_node` can tell
        ``loss.backward()`` from ``autograd.grad(loss, inputs)``. The leaf behind the anchor is on
        the parameters' device: only then does autograd end the pass on the streams from which
        ``backward()`` was called (no parameter of a private model is a leaf of the graph).
        """
        with torch.enable_grad():
            self.anchor = torch.zeros((), device=device, requires_grad=True).clone()

    def refresh(self) -> None:
        """Follow the optimizer's parameters: guard them all, anchor on their device."""
        parameters = self.guards.refresh(self.root)
        device = next((p.device for p in parameters if p.is_cuda), self.anchor.device)
        if device != self.anchor.device:
            self.place_anchor(device)

    def samples_for(self, rows: int, layer: str, axes: int = 0) -> int:
        """The number of samples behind `rows` rows of a layer's input, which has so many axes."""
        batch, samples = self.batch, None
        if batch is not None:
            samples = batch.samples
        elif self.sink is not None:
            samples = self.sink.samples
        if samples is None:
            self.guards.check_batch_norms()
            warnings.warn(
                f"layer {layer!r} was called outside the model's forward, where no trial can "
                "tell whether samples mix: its rows are taken for samples. Call the model instead",
                stacklevel=2,
            )
            samples = rows // self.views if rows % self.views == 0 else 0
        if not samples or rows_per_sample(rows, samples) is None:
            raise NotPerSample(
                f"layer {layer!r}: its input has {rows} rows for {samples} samples, so rows cannot "
                "be assigned to samples. Give it an input whose first axis is the sample axis "
                "(batch_first=False if it is the second), or freeze the layer"
            )
        if samples > 1:
            self.trials.check(layer, rows // samples, axes)
        if batch is not None:
            batch.marked = True
            if rows > batch.rows and samples > 1 and self.trials.untold:
                batch.folded = layer
        return samples
