"""Chooses a captured forward for each module of a model, and installs them."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dpkernels.engine.capture.computed_weight import ComputedWeightForward
from dpkernels.engine.capture.layer import CapturedForward, LayerForward
from dpkernels.engine.capture.layer_in_parts import PartsForward
from dpkernels.engine.capture.own_parameters import OwnParametersForward
from dpkernels.engine.capture.sample_by_sample import UnitForward
from dpkernels.engine.capture.session import Session
from dpkernels.engine.capture.whole_model import WholeModelForward
from dpkernels.layers import find_rule
from dpkernels.layers.composite import CompositeRule
from dpkernels.layers.sequence import stated_axis


def install(root: nn.Module, session: Session) -> list[CapturedForward]:
    """Put captured forwards on every layer that owns parameters, and on the model itself.

    Returns:
        The captured forwards in the order of installation (remove them in reverse).

    Raises:
        ValueError: the model is private already.
    """
    _refuse_captured(root)
    keep_compiler_out()
    installed: list[CapturedForward] = []
    for forward in _captured(root, "", session, session.axis, set()):
        forward.install()
        installed.append(forward)
    installed.append(WholeModelForward(root, "", session))
    installed[-1].install()
    return installed


@functools.cache
def keep_compiler_out() -> None:
    """Leave captured forwards out of compiled graphs; torch.compile takes what lies between them.

    Done once in a process, for the first private model, be the model made or restored from a
    pickle. Not done where the classes are defined: ``torch.compiler.disable`` loads torch's
    compiler, half a second that an import need not wait for and that every optimizer spends anyway.
    """
    for captured in (LayerForward, PartsForward, UnitForward, OwnParametersForward):
        captured.__call__ = torch.compiler.disable(captured.__call__)  # type: ignore[method-assign]
    WholeModelForward.__call__ = torch.compiler.disable(  # type: ignore[method-assign]
        WholeModelForward.__call__, recursive=False
    )


def _refuse_captured(root: nn.Module) -> None:
    """Raise where another session trains the model; remove captured forwards of a copied model."""
    for module in root.modules():
        forward = module.__dict__.get("forward")
        while isinstance(forward, CapturedForward):
            if forward.session.guards.held is not None:
                raise ValueError(
                    f"module: its {type(module).__name__} was made private before, and would be "
                    "clipped and noised twice; pass the wrapped module, or call its "
                    "to_standard_module() (cleanup() with wrap_model=False) first"
                )
            forward.remove()
            forward = module.__dict__.get("forward")


def _captured(
    module: nn.Module, name: str, session: Session, axis: int, seen: set[int]
) -> Iterator[CapturedForward]:
    """Captured forwards for a module, whose sample axis is `axis`, and for modules below it."""
    if id(module) in seen:
        return
    seen.add(id(module))
    stated = stated_axis(module)
    axis = axis if stated is None else stated
    rule = find_rule(module)
    owns = _has_forward(module) and _owns_parameters(module)
    if (isinstance(rule, CompositeRule) or (owns and rule is None)) and _gathers_below(module):
        raise ValueError(
            f"module {name or '(root)'!r} ({type(module).__name__}) owns parameters and has "
            "modules below it with a fully_shard of their own, so its samples cannot be run "
            "apart; move the parameters into a module of their own, or apply fully_shard to the "
            "root only"
        )
    if isinstance(rule, CompositeRule):
        yield PartsForward(module, name, session, rule)
        seen.update(id(below) for below in module.modules())
        return
    if owns:
        if rule is not None and _computed(module):
            yield ComputedWeightForward(module, name, session, axis, rule)
            seen.update(id(below) for below in module.modules())
            return
        if rule is not None:
            yield LayerForward(module, name, session, axis, rule)
        elif any(_has_forward(child) for child in _below(module)) and not _computed(module):
            yield OwnParametersForward(module, name, session, axis)
        else:
            yield UnitForward(module, name, session, axis)
            seen.update(id(below) for below in module.modules())
            return
    for key, child in module.named_children():
        yield from _captured(child, f"{name}.{key}" if name else key, session, axis, seen)


def _has_forward(module: nn.Module) -> bool:
    """Whether the module has a forward: containers (``nn.ModuleList``, ...) have none."""
    return type(module).forward is not nn.Module.forward


def _below(module: nn.Module) -> Iterator[nn.Module]:
    """Modules below one that is not an attention or a recurrent layer of PyTorch's."""
    if stated_axis(module) is None:
        yield from (below for below in module.modules() if below is not module)


def _gathers_below(module: nn.Module) -> bool:
    """Whether FSDP2 gathers parameters at the forward of a module below."""
    return any(isinstance(m, FSDPModule) for m in module.modules() if m is not module)


def _computed(module: nn.Module) -> bool:
    """Whether parametrizations compute the module's parameters."""
    return "parametrizations" in module._modules


def _owns_parameters(module: nn.Module) -> bool:
    """Whether the module's own forward uses parameters: the module's, or a container's below."""
    if any(p is not None for p in module._parameters.values()):
        return True
    if _computed(module):
        return True
    return any(_owns_parameters(c) for c in module.children() if not _has_forward(c))
