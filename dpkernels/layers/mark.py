"""The mark on a layer's output, by which the layer's backprops are heard of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

#: called in backward with backprops, detached, and with the tensors that were remembered
Receive = Callable[[torch.Tensor, Sequence[torch.Tensor]], None]


class _Mark(torch.autograd.Function):
    """Identity on an output, in place, whose backward hands the backprops over."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        anchor: torch.Tensor,
        receive: Receive,
        *saved: torch.Tensor,
    ) -> torch.Tensor:
        ctx.receive = receive
        ctx.save_for_backward(*saved)
        ctx.mark_dirty(output)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, backprops: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if backprops is not None:
            ctx.receive(backprops.detach(), ctx.saved_tensors)
        return (backprops, *(None for _ in ctx.needs_input_grad[1:]))


def mark(
    output: torch.Tensor, anchor: torch.Tensor, receive: Receive, *saved: torch.Tensor
) -> torch.Tensor:
    """The output with a mark on it: its backprops go to ``receive(backprops, saved)``.

    Args:
        output: what a layer, or a part of one, returns.
        anchor: a tensor that requires grad, so that autograd visits the mark of a first layer too.
        receive: takes the backprops.
        *saved: what must be remembered.
    """
    if output._is_view():
        output = torch.ops.aten._unsafe_view(output, output.shape)
    return _Mark.apply(output, anchor, receive, *(t.detach() for t in saved))
