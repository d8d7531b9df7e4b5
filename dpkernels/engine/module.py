"""The wrapped model in mode ``"fused"``, and the same without a wrapper."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from opacus.grad_sample import AbstractGradSampleModule
from opacus.grad_sample.gsm_base import AbstractGradSampleHooks
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dpkernels.engine.bare import BareForward
from dpkernels.engine.capture import ModelCapture
from dpkernels.engine.composite import CompositeForward
from dpkernels.engine.derived import DerivedForward
from dpkernels.engine.distributed import inner_model
from dpkernels.engine.forward import CapturedForward, LayerForward
from dpkernels.engine.gradients import PendingGradients
from dpkernels.engine.optimizer import FusedDPOptimizer
from dpkernels.engine.planner import Planner
from dpkernels.engine.probe import refuse_mixing
from dpkernels.engine.root import RootForward
from dpkernels.engine.unit import UnitForward
from dpkernels.engine.wrappers import Lockstep, sharded_parameters, wrapper_forwards
from dpkernels.layers import find_composite_rule, find_rule, refusal
from dpkernels.layers.sequence import stated_axis


def install(root: nn.Module, capture: ModelCapture) -> list[CapturedForward]:
    """Put captured forwards on every layer that owns parameters, and on the model itself.

    Returns:
        The captured forwards in the order of installation (remove them in reverse).

    Raises:
        ValueError: the model is private already.
    """
    _refuse_captured(root)
    _keep_compiler_out()
    installed: list[CapturedForward] = []
    for forward in _captured(root, "", capture, capture.axis, set()):
        forward.install()
        installed.append(forward)
    installed.append(RootForward(root, "", capture))
    installed[-1].install()
    return installed


@functools.cache
def _keep_compiler_out() -> None:
    """Leave captured forwards out of compiled graphs; torch.compile takes what lies between them.

    Done once in a process, for its first private model, be it made or restored from a pickle. Not
    where the classes are defined, as it loads torch's compiler: half a second that an import need
    not wait for and that every optimizer spends anyway.
    """
    for captured in (LayerForward, CompositeForward, UnitForward, BareForward):
        captured.__call__ = torch.compiler.disable(captured.__call__)  # type: ignore[method-assign]
    RootForward.__call__ = torch.compiler.disable(  # type: ignore[method-assign]
        RootForward.__call__, recursive=False
    )


def _refuse_captured(root: nn.Module) -> None:
    """Raise where another capture trains the model; take off what a copied model still carries."""
    for module in root.modules():
        forward = module.__dict__.get("forward")
        while isinstance(forward, CapturedForward):
            if forward.capture.held is not None:
                raise ValueError(
                    f"module: its {type(module).__name__} was made private before, and would be "
                    "clipped and noised twice; pass the wrapped module, or call its "
                    "to_standard_module() (cleanup() with wrap_model=False) first"
                )
            forward.remove()
            forward = module.__dict__.get("forward")


def _captured(
    module: nn.Module, name: str, capture: ModelCapture, axis: int, seen: set[int]
) -> Iterator[CapturedForward]:
    """Captured forwards for a module and what is below it, whose sample axis is `axis`."""
    if id(module) in seen:
        return
    seen.add(id(module))
    stated = stated_axis(module)
    axis = axis if stated is None else stated
    rule, composite = find_rule(module), find_composite_rule(module)
    owns = _has_forward(module) and _owns_parameters(module)
    if (composite is not None or (owns and rule is None)) and _gathers_below(module):
        raise ValueError(
            f"module {name or '(root)'!r} ({type(module).__name__}) owns parameters and has "
            "modules below it with a fully_shard of their own, so its samples cannot be run "
            "apart; move the parameters into a module of their own, or apply fully_shard to the "
            "root only"
        )
    if composite is not None:
        yield CompositeForward(module, name, capture, composite)
        seen.update(id(below) for below in module.modules())
        return
    if owns:
        if rule is not None and _computed(module):
            yield DerivedForward(module, name, capture, axis, rule)
            seen.update(id(below) for below in module.modules())
            return
        if rule is not None:
            yield LayerForward(module, name, capture, axis, rule)
        elif any(_has_forward(child) for child in _below(module)) and not _computed(module):
            yield BareForward(module, name, capture, axis)
        else:
            yield UnitForward(module, name, capture, axis)
            seen.update(id(below) for below in module.modules())
            return
    for key, child in module.named_children():
        yield from _captured(child, f"{name}.{key}" if name else key, capture, axis, seen)


def _has_forward(module: nn.Module) -> bool:
    """Containers (lists and dicts of modules or parameters) have none."""
    return type(module).forward is not nn.Module.forward


def _below(module: nn.Module) -> Iterator[nn.Module]:
    """What is below a module that is not an attention or a recurrent layer of PyTorch's."""
    if stated_axis(module) is None:
        yield from (below for below in module.modules() if below is not module)


def _gathers_below(module: nn.Module) -> bool:
    """Whether FSDP2 gathers parameters at the forward of a module below."""
    return any(isinstance(m, FSDPModule) for m in module.modules() if m is not module)


def _computed(module: nn.Module) -> bool:
    """Whether parametrizations compute the module's parameters."""
    return "parametrizations" in module._modules


def _owns_parameters(module: nn.Module) -> bool:
    """Whether the module's own forward uses parameters: its own, or those of a container in it."""
    if any(p is not None for p in module._parameters.values()):
        return True
    if _computed(module):
        return True
    return any(_owns_parameters(c) for c in module.children() if not _has_forward(c))


def incompatibilities(model: nn.Module) -> list[str]:
    """Every reason why the model has no per-sample gradients, each naming module and remedy."""
    reasons = [(name, module, refusal(module)) for name, module in model.named_modules()]
    return [
        f"module {name or '(root)'!r} ({type(module).__name__}): {reason}"
        for name, module, reason in reasons
        if reason is not None
    ]


class _FusedCapture:
    """What the wrapped module and the wrapper-less hooks share."""

    #: set by the Opacus class beside this one
    batch_first: bool

    def _start(
        self, model: nn.Module, views_per_sample: int, memory_budget: int | None, plan: str
    ) -> None:
        self.planner = Planner(memory_budget, plan)
        inner = inner_model(model)
        self.capture = ModelCapture(
            inner, batch_first=self.batch_first, views_per_sample=views_per_sample
        )
        self.capture.sharded = sharded_parameters(inner)
        self._installed = [*wrapper_forwards(model, self.capture), *install(inner, self.capture)]
        self._lockstep: Lockstep | None = None
        self._allow_accumulation = True
        self._optimizer: FusedDPOptimizer | None = None

    def connect(self, optimizer: FusedDPOptimizer) -> None:
        """Hand the gradients of `optimizer`'s parameters to it at the end of each backward pass."""
        _keep_compiler_out()
        self._optimizer = optimizer
        optimizer.grad_accumulation_allowed = self._allow_accumulation
        capture = self.capture
        capture.held = optimizer.held_parameters
        capture.sink = PendingGradients(
            self.planner, capture, optimizer.privatize, optimizer.streams
        )
        if self._lockstep is not None:
            self._lockstep.remove()
            self._lockstep = None
        if capture.sharded:
            self._lockstep = Lockstep(
                capture.root, capture, optimizer.processes, optimizer.is_last_physical_batch
            )
        else:
            capture.probe = torch.compiler.disable(refuse_mixing)
        capture.refresh()

    def forbid_grad_accumulation(self) -> None:
        """Refuse a second backward pass before ``optimizer.step()``: Poisson sampling needs it."""
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
        self.capture.release()
        self.capture.sink = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizer": None, "_lockstep": None}


class FusedGradSampleModule(_FusedCapture, AbstractGradSampleModule):
    """The model with capture installed, wrapped as Opacus wraps it.

    Args:
        m: the model.
        batch_first: whether the sample axis of its inputs is the first (else the second).
        loss_reduction: ``"mean"`` or ``"sum"``.
        views_per_sample: rows per sample at the model's input.
        memory_budget: bytes for stored per-sample gradients, None for a quarter of free memory.
        plan: ``"auto"`` or ``"measured"``, see :class:`dpkernels.engine.planner.Planner`.
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
    ):
        AbstractGradSampleModule.__init__(
            self, m, batch_first=batch_first, loss_reduction=loss_reduction
        )
        self._start(m, views_per_sample, memory_budget, plan)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear gradients, and the optimizer's sums with them: ``model.zero_grad()`` is enough."""
        super().zero_grad(set_to_none)
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none)


class FusedGradSampleHooks(_FusedCapture, AbstractGradSampleHooks):
    """The same without a wrapper (``wrap_model=False``): go on using your own model."""

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        views_per_sample: int = 1,
        memory_budget: int | None = None,
        plan: str = "auto",
    ):
        AbstractGradSampleHooks.__init__(
            self, m, batch_first=batch_first, loss_reduction=loss_reduction
        )
        self._start(m, views_per_sample, memory_budget, plan)
