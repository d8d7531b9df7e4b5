"""Cells alone, forwards and backwards, against autograd through the formulas of PyTorch's cells."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dpkernels.layers.recurrent_cells import Cell, GRUCell, LSTMCell, RNNCell, Run, Weights
from dpkernels.ops.recurrence.steps import Steps
from tests.engine.support import values

CELLS: dict[str, tuple[Cell, nn.RNNCellBase]] = {
    "lstm": (LSTMCell(), nn.LSTMCell(3, 2)),
    "gru": (GRUCell(), nn.GRUCell(3, 2)),
    "tanh": (RNNCell("tanh"), nn.RNNCell(3, 2)),
    "relu": (RNNCell("relu"), nn.RNNCell(3, 2, nonlinearity="relu")),
}
#: rows that are still running at each step
SIZES = [4, 4, 2, 1]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_outputs_states_and_gradients(name: str, reverse: bool) -> None:
    cell, module = CELLS[name]
    module = module.double()
    steps = Steps(SIZES, reverse)
    data = values(sum(SIZES), 3).requires_grad_()
    first = tuple(values(4, 2).cos().requires_grad_() for _ in range(1 + (name == "lstm")))
    state, outputs = list(first), [torch.empty(0)] * len(SIZES)
    split = data.split(SIZES)
    for t in steps.order():
        running = [s[: SIZES[t]] for s in state]
        new = module(split[t], tuple(running) if name == "lstm" else running[0])
        new = list(new) if name == "lstm" else [new]
        state = [torch.cat([n, s[SIZES[t] :]]) for n, s in zip(new, state, strict=True)]
        outputs[t] = new[0]
    expected = torch.cat(outputs)
    bias, bias_hh = module.bias_ih.detach(), module.bias_hh.detach()
    biases = (bias + bias_hh, None) if cell.one_bias else (bias, bias_hh)
    weights = Weights(module.weight_ih.detach(), module.weight_hh.detach(), None, *biases)
    run = cell.forward(data.detach(), tuple(s.detach() for s in first), weights, steps)
    torch.testing.assert_close(run.output, expected)
    torch.testing.assert_close(run.last, tuple(state))

    slopes = [t.detach().sin() for t in (expected, *state)]
    torch.autograd.backward([expected, *state], slopes)
    found = cell.backward(Run(slopes[0], tuple(slopes[1:]), run.saved), weights, steps)
    torch.testing.assert_close(found.first, tuple(s.grad for s in first))
    torch.testing.assert_close(found.input @ weights.input, data.grad)
    torch.testing.assert_close(found.input.t() @ data.detach(), module.weight_ih.grad)
    torch.testing.assert_close(found.state.t() @ run.saved[0], module.weight_hh.grad)
    module.zero_grad()
