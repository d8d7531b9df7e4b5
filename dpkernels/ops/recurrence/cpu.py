"""An LSTM on the CPU: products by the library, what lies between them in one C++ pass a step."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dpkernels.ops import native
from dpkernels.ops.native import why_not_cpu as unavailable
from dpkernels.ops.recurrence.steps import Steps, replaced, running

__all__ = [
    "lstm",
    "lstm_backward",
    "unavailable",
    "why_not_lstm",
    "why_not_lstm_backward",
]


def why_not_lstm(data: torch.Tensor, *rest: object, **named: object) -> str | None:
    """Why csrc/cpu/recurrence.cpp cannot take these arguments."""
    return None if data.dtype == torch.float32 else f"it takes float32, and these are {data.dtype}"


why_not_lstm_backward = why_not_lstm


def lstm(
    data: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    weight_hr: torch.Tensor | None,
    bias: torch.Tensor | None,
    h: torch.Tensor,
    c: torch.Tensor,
    sizes: list[int],
    reverse: bool,
) -> list[torch.Tensor]:
    """See the contract."""
    gates = F.linear(data, weight_ih, bias)
    width = c.shape[1]
    steps = Steps(sizes, reverse)
    recurrent = weight_hh.t()
    cell, cell_tanh, hidden = (gates.new_empty(len(gates), width) for _ in range(3))
    output = hidden if weight_hr is None else gates.new_empty(len(gates), len(weight_hr))
    sums, cells, hiddens, outputs = map(steps.split, (gates, cell, hidden, output))
    at_gates, *results = (t.data_ptr() for t in (gates, cell, cell_tanh, hidden))
    kernel, launch = native.extension(gates).lstm_step, native.launch_on(gates)
    first_h, first_c, c = h, c, c.contiguous()
    for t in steps.order():
        size = sizes[t]
        sums[t].addmm_(running(h, size), recurrent)
        kernel(at_gates, c.data_ptr(), *results, steps.firsts[t], size, width, launch)
        if weight_hr is not None:
            torch.mm(hiddens[t], weight_hr.t(), out=outputs[t])
        h, c = replaced(h, outputs[t]), replaced(c, cells[t])
    saved = [steps.before(first_h, output), gates, steps.before(first_c, cell), cell_tanh]
    return [output, h.clone(), c.clone(), *saved, *([] if weight_hr is None else [hidden])]


def lstm_backward(
    grad_output: torch.Tensor,
    grad_h: torch.Tensor,
    grad_c: torch.Tensor,
    gates: torch.Tensor,
    before_c: torch.Tensor,
    cell_tanh: torch.Tensor,
    weight_hh: torch.Tensor,
    weight_hr: torch.Tensor | None,
    sizes: list[int],
    reverse: bool,
) -> list[torch.Tensor]:
    """See the contract."""
    steps = Steps(sizes, reverse)
    gates, before_c, cell_tanh = (t.contiguous() for t in (gates, before_c, cell_tanh))
    saved = [t.data_ptr() for t in (gates, before_c, cell_tanh)]
    dh, dc = (t.clone(memory_format=torch.contiguous_format) for t in (grad_h, grad_c))
    grad_gates = torch.empty_like(gates)
    results = [t.data_ptr() for t in (grad_gates, dc)]
    at_sums, outer = map(steps.split, (grad_gates, grad_output))
    projected = None if weight_hr is None else torch.empty_like(grad_output)
    projections = None if projected is None else steps.split(projected)
    kernel, launch = native.extension(gates).lstm_step_backward, native.launch_on(gates)
    width = dc.shape[1]
    for t in reversed(list(steps.order())):
        size = sizes[t]
        now = hidden = running(dh, size).add_(outer[t])
        if projections is not None and weight_hr is not None:
            hidden = projections[t].copy_(now) @ weight_hr
        kernel(*results, hidden.data_ptr(), *saved, steps.firsts[t], size, width, launch)
        torch.mm(at_sums[t], weight_hh, out=now)
    return [grad_gates, dh, dc, *([] if projected is None else [projected])]
