"""The private model of mode ``"fused"``: capture installed, with Opacus' wrapper or without."""

from __future__ import annotations

from typing import Any

import torch
from opacus.grad_sample import AbstractGradSampleModule
from opacus.grad_sample.gsm_base import AbstractGradSampleHooks
from torch import nn

from dpkernels.engine.capture.install import install, keep_compiler_out
from dpkernels.engine.capture.session import Session
from dpkernels.engine.plan.planner import Planner
from dpkernels.engine.processes.collectives import inner_model
from dpkernels.engine.processes.lockstep import Lockstep, sharded_parameters, wrapper_forwards
from dpkernels.engine.release.optimizer import FusedDPOptimizer
from dpkernels.engine.release.pending import PendingGradients
from dpkernels.engine.trial.mixing import refuse_mixing


class _FusedCapture:
    """The common part of :class:`FusedGradSampleModule` and :class:`FusedGradSampleHooks`.

    Args:
        m: the model.
        batch_first: whether the sample axis of the model's inputs is the first (else the second).
        loss_reduction: ``"mean"`` or ``"sum"``.
        views_per_sample: rows per sample at the model's input.
        memory_budget: bytes for stored per-sample gradients, None for a quarter of free memory.
        plan: ``"auto"`` or ``"measured"``, see :class:`dpkernels.engine.plan.planner.Planner`.
        trial: when samples are tried for mixing, see
            :class:`dpkernels.engine.capture.trial_book.TrialBook`.
    """

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        views_per_sample: int = 1,
        memory_budget: int | None = None,
        plan: str = "auto",
        trial: str = "doubling",
    ):
        # super() is Opacus' class, the second base of both subclasses
        super().__init__(m, batch_first=batch_first, loss_reduction=loss_reduction)  # type: ignore[call-arg]
        self.planner = Planner(memory_budget, plan)
        inner = inner_model(m)
        self.session = Session(
            inner, batch_first=batch_first, views_per_sample=views_per_sample, trial=trial
        )
        self.session.guards.sharded = sharded_parameters(inner)
        self._installed = [*wrapper_forwards(m, self.session), *install(inner, self.session)]
        self._lockstep: Lockstep | None = None
        self._allow_accumulation = True
        self._optimizer: FusedDPOptimizer | None = None

    def connect(self, optimizer: FusedDPOptimizer) -> None:
        """Hand the pending gradients to `optimizer` at the end of each backward pass."""
        keep_compiler_out()
        self._optimizer = optimizer
        optimizer.grad_accumulation_allowed = self._allow_accumulation
        session = self.session
        session.guards.held = optimizer.held_parameters
        session.sink = PendingGradients(
            self.planner, session, optimizer.privatize, optimizer.streams
        )
        if self._lockstep is not None:
            self._lockstep.remove()
            self._lockstep = None
        if session.guards.sharded:
            self._lockstep = Lockstep(
                session.root, session, optimizer.processes, optimizer.is_last_physical_batch
            )
        elif session.schedule != "off":
            session.trials.trial = torch.compiler.disable(refuse_mixing)
        session.refresh()

    def forbid_grad_accumulation(self) -> None:
        """Refuse a second backward pass before ``optimizer.step()``, as Poisson sampling needs."""
        self._set_accumulation(False)

    def allow_grad_accumulation(self) -> None:
        """Let several backward passes add up before ``optimizer.step()``."""
        self._set_accumulation(True)

    def _set_accumulation(self, allowed: bool) -> None:
        self._allow_accumulation = allowed
        if self._optimizer is not None:
            self._optimizer.grad_accumulation_allowed = allowed

    def remove_hooks(self) -> None:
        """Give every layer its own forward back."""
        for forward in reversed(self._installed):
            forward.remove()
        self._installed = []
        if self._lockstep is not None:
            self._lockstep.remove()
        self.session.guards.remove()
        self.session.sink = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizer": None, "_lockstep": None}


class FusedGradSampleModule(_FusedCapture, AbstractGradSampleModule):
    """The model with capture installed, wrapped as Opacus wraps it."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear gradients, and the optimizer's sums with them: ``model.zero_grad()`` is enough."""
        super().zero_grad(set_to_none)
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none)


class FusedGradSampleHooks(_FusedCapture, AbstractGradSampleHooks):
    """Capture installed without a wrapper (``wrap_model=False``): go on using your own model."""


def make_module(
    module: nn.Module, *, wrap_model: bool, batch_first: bool, loss_reduction: str, **kwargs: Any
) -> FusedGradSampleModule | FusedGradSampleHooks:
    """Install capture on a model; a :class:`FusedGradSampleModule` is returned as it is.

    Args:
        module: the model, or a :class:`FusedGradSampleModule` from an earlier call.
        wrap_model: whether the result wraps the model.
        batch_first: as in :class:`FusedGradSampleModule`.
        loss_reduction: as in :class:`FusedGradSampleModule`.
        **kwargs: other arguments of :class:`FusedGradSampleModule`.

    Raises:
        ValueError: the model was wrapped before, by Opacus or with other arguments.
    """
    if isinstance(module, FusedGradSampleModule):
        if module.batch_first != batch_first or module.loss_reduction != loss_reduction:
            raise ValueError(
                "Pre-existing GradSampleModule doesn't match new arguments: it has "
                f"batch_first={module.batch_first}, loss_reduction={module.loss_reduction!r}, "
                f"requested batch_first={batch_first}, loss_reduction={loss_reduction!r}. "
                "Please pass vanilla nn.Module instead"
            )
        return module
    if isinstance(module, AbstractGradSampleModule):
        raise ValueError(
            f"Pre-existing GradSampleModule of type {type(module).__name__} doesn't match "
            "grad_sample_mode='fused'. Please pass vanilla nn.Module instead"
        )
    kind = FusedGradSampleModule if wrap_model else FusedGradSampleHooks
    return kind(module, batch_first=batch_first, loss_reduction=loss_reduction, **kwargs)
