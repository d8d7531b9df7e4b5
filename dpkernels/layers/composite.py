"""Layers that run in parts, each part with an operand of its own: recurrent layers, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from dpkernels import ops
from dpkernels.layers.fold import merge_positions
from dpkernels.layers.mark import mark as mark_output
from dpkernels.layers.operands import LinearOperand, Operand, PieceOperand, StoredOperand

#: a parameter and what it has received
Found = Iterable[tuple[nn.Parameter, Operand]]


class Recorder(Protocol):
    """The engine's side of one call of a composite layer."""

    #: number of samples; rows are a multiple of it
    samples: int
    #: a tensor that requires gradients, so that the parts' backward is reached at all
    anchor: torch.Tensor

    def wants(self, parameter: nn.Parameter | None) -> bool:
        """Whether the parameter is trained."""

    def saw(self, rows: torch.Tensor) -> None:
        """Activations, sample axis first, as they pass by."""

    def receive(self, backprops: torch.Tensor, found: Found) -> None:
        """Called in backward: a part's backprops, sample axis first, and operands made of them."""


class CompositeRule:
    """How a layer with several inputs, outputs or steps runs so that its parts are captured.

    Stateless. Parameters take part out of autograd (``detach()``); gradients of inputs go on.
    """

    #: classes whose own ``forward`` this rule stands for
    handles: ClassVar[tuple[type[nn.Module], ...]]

    def applies(self, module: nn.Module) -> bool:
        """Whether the rule holds for the module as it stands: its class's own forward, its own
        parameters, none of them computed."""
        base = next((b for b in self.handles if isinstance(module, b)), None)
        return (
            base is not None
            and type(module).forward is base.forward
            and "forward" not in module.__dict__
            and not any("parametrizations" in m._modules for m in module.modules())
            and self.knows(module)
        )

    def knows(self, module: Any) -> bool:
        """Whether every parameter and option of the module is understood."""
        raise NotImplementedError

    def refusal(self, module: Any) -> str | None:
        """Why this module has no per-sample gradient, with the remedy; None if it has."""
        return None

    def rows(self, module: Any, arguments: dict[str, Any]) -> int:
        """Rows along the sample axis of the layer's input.

        Raises:
            ValueError: the arguments have no sample axis.
        """
        raise NotImplementedError

    def run(self, module: Any, arguments: dict[str, Any], recorder: Recorder) -> Any:
        """What the layer's own forward returns for these arguments, by name."""
        raise NotImplementedError


def mark(
    recorder: Recorder,
    output: torch.Tensor,
    operands: Callable[[torch.Tensor, Sequence[torch.Tensor]], Found],
    *saved: torch.Tensor,
    axis: int = 0,
) -> torch.Tensor:
    """The output, whose backprops go to ``operands(backprops, saved)`` with rows first.

    Args:
        recorder: of this call.
        output: of a part; `axis` is its sample axis.
        operands: makes operands of backprops, sample axis first, and of `saved`.
        *saved: what must be remembered, as it stands.
        axis: the sample axis of `output`.
    """

    def receive(backprops: torch.Tensor, saved: Sequence[torch.Tensor]) -> None:
        rows = backprops.movedim(axis, 0)
        recorder.receive(rows, operands(rows, saved))

    return mark_output(output, recorder.anchor, receive, *saved)


@dataclass(frozen=True)
class Part:
    """A parameter, or `count` of its rows: packed projections are several weights in one."""

    parameter: nn.Parameter
    start: int = 0
    count: int | None = None

    def value(self) -> torch.Tensor:
        """Out of autograd."""
        whole = self.parameter.detach()
        return whole if self.count is None else whole.narrow(0, self.start, self.count)

    def found(self, operand: Operand) -> tuple[nn.Parameter, Operand]:
        """The parameter, and what it receives."""
        if self.count not in (None, len(self.parameter)):
            operand = PieceOperand(operand, self.start, len(self.parameter))
        return self.parameter, operand


def linear(
    recorder: Recorder, x: torch.Tensor, weight: Part, bias: Part | None, axis: int
) -> torch.Tensor:
    """``F.linear``, its parameters captured; `axis` of `x` is the sample axis."""
    output = F.linear(x, weight.value(), None if bias is None else bias.value())

    def operands(backprops: torch.Tensor, saved: Sequence[torch.Tensor]) -> Found:
        activations = saved[0].movedim(axis, 0)
        yield from linear_operands(recorder, activations, backprops, weight, bias)

    if recorder.wants(weight.parameter) or (bias and recorder.wants(bias.parameter)):
        return mark(recorder, output, operands, x, axis=axis)
    return output


def linear_operands(
    recorder: Recorder,
    activations: torch.Tensor,
    backprops: torch.Tensor,
    weight: Part | None,
    *biases: Part | None,
) -> Found:
    """Operands of one projection: activations [rows, *, I], backprops [rows, *, O].

    Biases that are added up have one gradient, which is formed once.
    """
    grad = merge_positions(backprops, recorder.samples)
    if weight is not None and recorder.wants(weight.parameter):
        x = merge_positions(activations, recorder.samples).to(grad.dtype)
        yield weight.found(LinearOperand(x, grad))
    wanted = [b for b in biases if b is not None and recorder.wants(b.parameter)]
    if wanted:
        operand = StoredOperand(ops.bias_last_grad_sample(grad))
        yield from (bias.found(operand) for bias in wanted)
