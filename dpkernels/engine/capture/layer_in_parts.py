"""Capture for layers that run in parts (`dpkernels.layers.composite`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpkernels.engine.capture.layer import CapturedForward, refuse_unwanted
from dpkernels.engine.capture.refusals import NotPerSample
from dpkernels.engine.capture.session import Session
from dpkernels.layers.composite import CompositeRule, Found
from dpkernels.layers.sequence import arguments_of
from dpkernels.ops.precision import full_precision


class PartsForward(CapturedForward):
    """Runs the layer by its rule while its parameters, own and below, are trained."""

    def __init__(self, module: nn.Module, name: str, session: Session, rule: CompositeRule):
        super().__init__(module, name, session)
        self.rule = rule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        if session.open_sink is None:
            return self.original(*args, **kwargs)
        wanted = {
            id(module._parameters[name])
            for module in self.module.modules()
            for name in session.guards.wanted(module)
        }
        if not wanted:
            return self.original(*args, **kwargs)
        arguments = arguments_of(self.module, args, kwargs)
        samples = session.samples_for(self.rows(arguments), self.name)
        recorder = CallRecorder(self, samples, wanted)
        return self.rule.run(self.module, arguments, recorder)

    def rows(self, arguments: dict[str, Any]) -> int:
        """Rows of a call along the sample axis that the layer itself prescribes."""
        try:
            return self.rule.rows(self.module, arguments)
        except ValueError as error:
            raise NotPerSample(
                f"module {self.name!r} ({type(self.module).__name__}): {error}"
            ) from None


class CallRecorder:
    """One call of a composite layer: answers the rule's questions, takes the rule's operands."""

    def __init__(self, owner: PartsForward, samples: int, wanted: set[int]):
        self.owner = owner
        self.samples = samples
        self.anchor = owner.session.anchor
        self._wanted = wanted

    def wants(self, parameter: nn.Parameter | None) -> bool:
        """Whether the parameter is trained."""
        return id(parameter) in self._wanted

    def saw(self, rows: torch.Tensor) -> None:
        """Show activations, sample axis first, to the sink."""
        sink = self.owner.session.open_sink
        if sink is not None:
            sink.saw(self.owner.name, "activations", rows, self.samples)

    def receive(self, backprops: torch.Tensor, found: Found) -> None:
        """Take a part's backprops, sample axis first, and the operands of them, in backward."""
        session, name = self.owner.session, self.owner.name
        sink = session.receiving_sink(self.samples)
        if sink is None:
            return
        with full_precision():
            sink.saw(name, "backprops", backprops, self.samples)
            for parameter, operand in found if sink.trains else ():
                if id(parameter) not in self._wanted:
                    unwanted = session.guards.names.get(id(parameter), "?")
                    refuse_unwanted(self.owner, self.owner.rule, unwanted)
                sink.add(parameter, operand, self.samples, name)
