"""The equations of an LSTM, step by step."""

from __future__ import annotations

import torch

from dpkernels.ops.recurrence.records import Gradients, RecurrentWeights, Saved, State, Weights
from dpkernels.ops.recurrence.steps import Steps, replaced, running


def lstm(data: torch.Tensor, weights: Weights, first: State, steps: Steps) -> list[torch.Tensor]:
    """See the contract."""
    (weight_ih, weight_hh, weight_hr, bias), (h, c) = weights, first
    inputs, sizes = steps.split(data), steps.sizes
    found: dict[int, list[torch.Tensor]] = {}
    for t in steps.order():
        before, before_c = running(h, sizes[t]), running(c, sizes[t])
        sums = inputs[t] @ weight_ih.t() + before @ weight_hh.t()
        into, forget, new, out = (sums if bias is None else sums + bias).chunk(4, 1)
        gates = torch.cat([into.sigmoid(), forget.sigmoid(), new.tanh(), out.sigmoid()], 1)
        into, forget, new, out = gates.chunk(4, 1)
        cell = forget * before_c + into * new
        hidden = out * cell.tanh()
        output = hidden if weight_hr is None else hidden @ weight_hr.t()
        h, c = replaced(h, output), replaced(c, cell)
        found[t] = [output, before, gates, before_c, cell.tanh(), hidden]
    output, *saved, hidden = (torch.cat(parts) for parts in zip(*(found[t] for t in sorted(found))))
    return [output, h.clone(), c.clone(), *saved, *([] if weight_hr is None else [hidden])]


def lstm_backward(
    grads: Gradients, saved: Saved, weights: RecurrentWeights, steps: Steps
) -> list[torch.Tensor]:
    """See the contract."""
    (grad_output, grad_h, grad_c), (weight_hh, weight_hr) = grads, weights
    of_step, sizes = list(zip(*map(steps.split, (grad_output, *saved)), strict=True)), steps.sizes
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for t in reversed(list(steps.order())):
        outer, values, old, c_tanh = of_step[t]
        into, forget, new, out = values.chunk(4, 1)
        at_output = running(grad_h, sizes[t]) + outer
        at_hidden = at_output if weight_hr is None else at_output @ weight_hr
        at_cell = running(grad_c, sizes[t]) + at_hidden * out * (1 - c_tanh.square())
        at_gates = [
            at_cell * new * into * (1 - into),
            at_cell * old * forget * (1 - forget),
            at_cell * into * (1 - new.square()),
            at_hidden * c_tanh * out * (1 - out),
        ]
        at_sums = torch.cat(at_gates, 1)
        grad_c = replaced(grad_c, at_cell * forget)
        grad_h = replaced(grad_h, at_sums @ weight_hh)
        found[t] = at_sums, at_output
    grad_gates, projected = (torch.cat(parts) for parts in zip(*(found[t] for t in sorted(found))))
    return [grad_gates, grad_h, grad_c, *([] if weight_hr is None else [projected])]
