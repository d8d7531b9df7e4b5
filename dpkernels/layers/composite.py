"""Layers that run in parts, each part with an operand of its own: recurrent layers, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from dpkernels import ops
from dpkernels.layers.fold import merge_rows
from dpkernels.layers.operands import LinearOperand, Operand, StoredOperand

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

    def rows(self, module: Any, arguments: dict[str, Any]) -> int:
        """Rows along the sample axis of the layer's input.

        Raises:
            ValueError: the arguments have no sample axis.
        """
        raise NotImplementedError

    def run(self, module: Any, arguments: dict[str, Any], recorder: Recorder) -> Any:
        """What the layer's own forward returns for these arguments, by name."""
        raise NotImplementedError


class _Mark(torch.autograd.Function):
    """Identity on a part's output, in place, whose backward hands the backprops over."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        recorder: Recorder,
        operands: Callable[[torch.Tensor, Sequence[torch.Tensor]], Found],
        anchor: torch.Tensor,
        *saved: torch.Tensor,
    ) -> torch.Tensor:
        ctx.recorder, ctx.operands = recorder, operands
        ctx.save_for_backward(*saved)
        ctx.mark_dirty(output)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, backprops: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if backprops is not None:
            rows = backprops.detach()
            ctx.recorder.receive(rows, ctx.operands(rows, ctx.saved_tensors))
        return (backprops, *(None for _ in ctx.needs_input_grad[1:]))


def mark(
    recorder: Recorder,
    output: torch.Tensor,
    operands: Callable[[torch.Tensor, Sequence[torch.Tensor]], Found],
    *saved: torch.Tensor,
) -> torch.Tensor:
    """The output, [rows, ...], whose backprops go to ``operands(backprops, saved)``."""
    if output._is_view():
        output = torch.ops.aten._unsafe_view(output, output.shape)
    return _Mark.apply(output, recorder, operands, recorder.anchor, *(t.detach() for t in saved))


def linear(
    recorder: Recorder, x: torch.Tensor, weight: nn.Parameter, bias: nn.Parameter | None
) -> torch.Tensor:
    """``F.linear`` on [rows, *, I], its parameters captured."""
    output = F.linear(x, weight.detach(), None if bias is None else bias.detach())
    if not recorder.wants(weight) and not recorder.wants(bias):
        return output

    def operands(backprops: torch.Tensor, saved: Sequence[torch.Tensor]) -> Found:
        yield from linear_operands(recorder, saved[0], backprops, weight, bias)

    return mark(recorder, output, operands, x)


def linear_operands(
    recorder: Recorder,
    activations: torch.Tensor,
    backprops: torch.Tensor,
    weight: nn.Parameter | None,
    bias: nn.Parameter | None,
) -> Found:
    """Operands of one projection: activations [rows, *, I], backprops [rows, *, O]."""
    grad = backprops.reshape(len(backprops), -1, backprops.shape[-1])
    grad = merge_rows(grad, recorder.samples)
    if weight is not None and recorder.wants(weight):
        x = activations.reshape(len(activations), -1, activations.shape[-1])
        yield weight, LinearOperand(merge_rows(x, recorder.samples).to(grad.dtype), grad)
    if bias is not None and recorder.wants(bias):
        yield bias, StoredOperand(ops.bias_last_grad_sample(grad))
