"""An LSTM by PyTorch's kernels, on any device: as few and as large calls as possible.

All that does not depend on the step after is done for all steps at once.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dpkernels.ops.recurrence.steps import Steps, replaced, running

aten = torch.ops.aten


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
    cells, tanhs, hiddens = map(steps.split, (cell, cell_tanh, hidden))
    step, ins, forgets, news, outs = map(steps.split, (gates, *gates.chunk(4, 1)))
    in_forgets = steps.split(gates[:, : 2 * width])
    output, outputs = hidden, hiddens
    if weight_hr is not None:
        output = gates.new_empty(len(gates), len(weight_hr))
        outputs = steps.split(output)
    first_h, first_c = h, c
    for t in steps.order():
        step[t].addmm_(running(h, sizes[t]), recurrent)
        in_forgets[t].sigmoid_()
        news[t].tanh_()
        outs[t].sigmoid_()
        torch.mul(forgets[t], running(c, sizes[t]), out=cells[t]).addcmul_(ins[t], news[t])
        torch.mul(outs[t], torch.tanh(cells[t], out=tanhs[t]), out=hiddens[t])
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
    into, forget, new, out = gates.chunk(4, 1)
    factor = torch.addcmul(gates, gates, gates, value=-1.0)
    at_into, at_forget, at_new, at_out = factor.chunk(4, 1)
    at_into.mul_(new)
    at_forget.mul_(before_c)
    at_new.copy_(aten.tanh_backward(into, new))
    at_out.mul_(cell_tanh)
    to_cell = aten.tanh_backward(out, cell_tanh)
    grad_gates = torch.empty_like(gates)
    step = steps.split(grad_gates)
    per_gate, factors = (steps.split(t.unflatten(1, (4, -1))[:, :3]) for t in (grad_gates, factor))
    out_gates, to_outs = (steps.split(t.chunk(4, 1)[3]) for t in (grad_gates, factor))
    to_cells, forgets, outer = map(steps.split, (to_cell, forget, grad_output))
    projected = None if weight_hr is None else torch.empty_like(grad_output)
    projections = None if projected is None else steps.split(projected)
    dh, dc = grad_h, grad_c
    for t in reversed(list(steps.order())):
        now = running(dh, sizes[t]) + outer[t]
        if projections is not None and weight_hr is not None:
            now = projections[t].copy_(now) @ weight_hr
        at_cell = torch.addcmul(running(dc, sizes[t]), now, to_cells[t])
        torch.mul(factors[t], at_cell.unsqueeze(1), out=per_gate[t])
        torch.mul(to_outs[t], now, out=out_gates[t])
        dc = replaced(dc, at_cell * forgets[t])
        dh = replaced(dh, step[t] @ weight_hh)
    return [grad_gates, dh, dc, *([] if projected is None else [projected])]
