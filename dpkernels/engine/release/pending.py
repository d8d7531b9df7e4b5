"""Per-sample gradients of one backward pass, parameter by parameter, until clipping."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dpkernels.engine.capture.refusals import NotPerSample
from dpkernels.engine.capture.session import Session, Sink
from dpkernels.engine.capture.streams import Streams, refuse_graph_capture
from dpkernels.engine.plan.planner import Planner
from dpkernels.engine.plan.strategies import held_by
from dpkernels.layers import margins
from dpkernels.layers.operands import Factored, Operand
from dpkernels.ops.precision import full_precision
from dpkernels.ops.sums import squared_norms


class ParameterGradient:
    """One parameter's contributions: either stored per-sample gradients or one factored operand.

    The gradient of a parameter that is used several times (a reused layer, tied weights) is the SUM
    of the contributions, so the second contribution turns the first into per-sample gradients.
    """

    def __init__(self) -> None:
        self.stored: torch.Tensor | None = None
        self.factored: Factored | None = None
        self._norm_sq: torch.Tensor | None = None

    @property
    def started(self) -> bool:
        """Whether there was a contribution."""
        return self.stored is not None or self.factored is not None

    def begin(self, held: torch.Tensor | Factored) -> None:
        """Take the first contribution, in the form in which a strategy holds it."""
        if isinstance(held, torch.Tensor):
            self.stored = held
        else:
            self.factored, self._norm_sq = held, held.norm_sq()

    def add(self, operand: Operand) -> None:
        """Add one more contribution; the gradient is stored from then on."""
        self.stored = self.materialize() + operand.grad_sample()
        self._norm_sq = None

    def materialize(self) -> torch.Tensor:
        """[B, *shape]: the stored per-sample gradients, formed now from factors if need be."""
        if self.stored is None:
            if self.factored is None:
                raise ValueError("materialize(): no contribution was added, expected at least one")
            self.stored, self.factored, self._norm_sq = self.factored.grad_sample(), None, None
        return self.stored

    def let_go(self) -> None:
        """Free the factors after summing: the sums of other parameters need room."""
        self.factored = None

    def norm_sq(self) -> torch.Tensor:
        """[B]: squared norm of each sample's gradient, as computed."""
        if self._norm_sq is None:
            self._norm_sq = squared_norms(self.materialize())
        return self._norm_sq

    def bound_sq(self) -> torch.Tensor:
        """[B]: squared norm of each sample's gradient, margin included.

        Clip factors are taken from the norm with margin, so that every summed vector has norm at
        most C in spite of rounding (docs/math.md, section 1).
        """
        norm_sq = self.norm_sq()
        if self.factored is not None:
            return self.factored.norm_bound(norm_sq).square().to(norm_sq.dtype)
        return margins.of_values_sq(norm_sq)


class PendingGradients(Sink):
    """The sink of one model's capture: collects contributions, and reports when backward ends.

    Args:
        planner: chooses how each parameter's norm is computed.
        session: the model's session, for parameter names and whether the batch was empty.
        done: called once at the end of each backward pass with this object.
        streams: the CUDA streams on which contributions are formed.
    """

    trains = True

    def __init__(
        self,
        planner: Planner,
        session: Session,
        done: Callable[[PendingGradients], None],
        streams: Streams,
    ):
        super().__init__()
        self.planner = planner
        self.names = session.guards.names
        self._session = session
        self._done = done
        self._streams = streams
        self.gradients: dict[nn.Parameter, ParameterGradient] = {}

    @property
    def empty(self) -> bool:
        """Whether the model's batch had no sample (and ran on a blank sample)."""
        batch = self._session.backward_batch
        return batch is not None and batch.empty

    def begin(self, samples: int) -> None:
        """A backward pass over `samples` samples is under way: ask autograd to report its end."""
        if self.samples is None:
            self.samples = samples
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        elif self.samples != samples:
            raise NotPerSample(
                f"one backward pass covers forward passes over {self.samples} and {samples} "
                "samples, so their rows cannot be paired; run backward() and step() for each"
            )

    def add(self, parameter: nn.Parameter, operand: Operand, samples: int, layer: str) -> None:
        """Take one parameter's contribution from one call of one layer."""
        parameter = self._session.guards.held_as(parameter)
        self._streams.note(parameter.device)
        gradient = self.gradients.setdefault(parameter, ParameterGradient())
        name = self.names.get(id(parameter), "?")
        if gradient.started:
            self.planner.reused(name)
            gradient.add(operand)
            return
        choice = self.planner.choose(operand, name, layer, parameter)
        gradient.begin(held_by(choice.strategy, operand, parameter, choice.forced))

    def refuse_not_finite(self, norm_sq: torch.Tensor) -> None:
        """Raise for the first sample whose `norm_sq`, [B], over all parameters is not finite."""
        finite = norm_sq.isfinite()
        if bool(finite.all()):
            return
        sample = int((~finite).nonzero()[0])
        layers = [
            self.names.get(id(p), "?")
            for p, g in self.gradients.items()
            if not bool(g.norm_sq()[sample].isfinite())
        ]
        raise ValueError(
            f"sample {sample} of this batch has a gradient that is not finite (parameters: "
            f"{', '.join(layers[:4])}{', ...' if len(layers) > 4 else ''}). Look for NaN or "
            "infinite values in its input or target, or a diverging loss; nothing was released"
        )

    def reset(self) -> None:
        super().reset()
        self.gradients = {}
        self._streams.forget()

    def _finish(self) -> None:
        try:
            refuse_graph_capture("backward()")
            self._streams.gather()
            try:
                with full_precision():
                    self._done(self)
                self.planner.settle()
            finally:
                self._streams.complete()
        finally:
            self.reset()
