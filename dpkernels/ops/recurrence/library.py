"""An LSTM by PyTorch's kernels, on any device: as few and as large calls as possible.

All that does not depend on the step after is done for all steps at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from dpkernels.ops.recurrence.records import Gradients, RecurrentWeights, Saved, State, Weights
from dpkernels.ops.recurrence.steps import Steps, replaced, running

aten = torch.ops.aten


Step = Callable[[int, torch.Tensor], None]
"""Takes a step's index and the cells before it; makes the step's gates, cells and states."""


def _step_by_library(of_steps: tuple[torch.Tensor, ...], steps: Steps) -> Step:
    """A step on gates [N, 4H], which hold the sums; cells, tanh of them and states, [N, H]."""
    gates = of_steps[0]
    cells, tanhs, hiddens = map(steps.split, of_steps[1:])
    ins, forgets, news, outs = map(steps.split, gates.chunk(4, 1))
    in_forgets = steps.split(gates[:, : gates.shape[1] // 2])

    def step(t: int, c: torch.Tensor) -> None:
        in_forgets[t].sigmoid_()
        news[t].tanh_()
        outs[t].sigmoid_()
        torch.mul(forgets[t], running(c, steps.sizes[t]), out=cells[t]).addcmul_(ins[t], news[t])
        torch.mul(outs[t], torch.tanh(cells[t], out=tanhs[t]), out=hiddens[t])

    return step


def lstm(
    data: torch.Tensor,
    weights: Weights,
    first: State,
    steps: Steps,
    step_by: Callable[[tuple[torch.Tensor, ...], Steps], Step] = _step_by_library,
) -> list[torch.Tensor]:
    """See the contract. What lies between the matrix products is done by `step_by`."""
    h, c = first.h, first.c.contiguous()
    gates = F.linear(data, weights.weight_ih, weights.bias)
    recurrent, projection = weights.weight_hh.t(), weights.weight_hr
    cell, cell_tanh, hidden = (gates.new_empty(len(gates), c.shape[1]) for _ in range(3))
    output = hidden if projection is None else gates.new_empty(len(gates), len(projection))
    sums, cells, hiddens, outputs = map(steps.split, (gates, cell, hidden, output))
    step = step_by((gates, cell, cell_tanh, hidden), steps)
    for t in steps.order():
        sums[t].addmm_(running(h, steps.sizes[t]), recurrent)
        step(t, c)
        if projection is not None:
            torch.mm(hiddens[t], projection.t(), out=outputs[t])
        h, c = replaced(h, outputs[t]), replaced(c, cells[t])
    saved = [steps.before(first.h, output), gates, steps.before(first.c, cell), cell_tanh]
    return [output, h.clone(), c.clone(), *saved, *([] if projection is None else [hidden])]


def lstm_backward(
    grads: Gradients, saved: Saved, weights: RecurrentWeights, steps: Steps
) -> list[torch.Tensor]:
    """See the contract."""
    gates, before_c, cell_tanh = saved
    grad_output, dh, dc = grads
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
    projection = weights.weight_hr
    projected = [] if projection is None else [torch.empty_like(grad_output)]
    projections = [steps.split(each) for each in projected]
    for t in reversed(list(steps.order())):
        size = steps.sizes[t]
        now = running(dh, size) + outer[t]
        if projection is not None:
            now = projections[0][t].copy_(now) @ projection
        at_cell = torch.addcmul(running(dc, size), now, to_cells[t])
        torch.mul(factors[t], at_cell.unsqueeze(1), out=per_gate[t])
        torch.mul(to_outs[t], now, out=out_gates[t])
        dc = replaced(dc, at_cell * forgets[t])
        dh = replaced(dh, step[t] @ weights.weight_hh)
    return [grad_gates, dh, dc, *projected]
